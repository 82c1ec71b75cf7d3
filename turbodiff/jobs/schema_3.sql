-- What version 3 adds: whose a job is, until when it may wait, and who uses the API under a name.
ALTER TABLE job ADD COLUMN user TEXT NOT NULL DEFAULT '';
ALTER TABLE job ADD COLUMN expires_s REAL;
CREATE INDEX job_of_user ON job(user, state, place);
CREATE INDEX job_expiry ON job(expires_s) WHERE expires_s IS NOT NULL;
CREATE TABLE api_user (
    name TEXT PRIMARY KEY,
    token_sha256 TEXT NOT NULL,
    share INTEGER NOT NULL,
    most_waiting INTEGER NOT NULL,
    webhook TEXT NOT NULL DEFAULT '',
    webhook_key TEXT NOT NULL DEFAULT '',
    created_s REAL NOT NULL
);
