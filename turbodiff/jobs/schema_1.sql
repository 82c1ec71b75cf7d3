-- The tables of schema version 1. Never edited since it was released: a later version is a script of its own.
CREATE TABLE job (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    nonce TEXT NOT NULL UNIQUE,
    client TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL CHECK (state IN
        ('queued', 'running', 'verifying', 'done', 'failed', 'cancelled', 'parked')),
    place REAL NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    slot INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,
    plan TEXT,
    overrides TEXT NOT NULL DEFAULT '{}',
    strikes TEXT NOT NULL DEFAULT '{}',
    cap_bytes INTEGER,
    hold_bytes INTEGER,
    ask TEXT NOT NULL DEFAULT '',
    progress TEXT,
    error TEXT,
    result TEXT,
    parent INTEGER,
    created_s REAL NOT NULL,
    started_s REAL,
    ended_s REAL
);
CREATE INDEX job_queue ON job(state, place, id);

CREATE TABLE event (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job INTEGER NOT NULL REFERENCES job(id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    type TEXT NOT NULL,
    t_s REAL NOT NULL,
    at_s REAL NOT NULL,
    fields TEXT NOT NULL
);
CREATE INDEX event_of_job ON event(job, seq);
CREATE UNIQUE INDEX event_in_place ON event(job, attempt, type) WHERE type IN ('step', 'preview');

CREATE TABLE artifact (
    id INTEGER PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES job(id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    path TEXT NOT NULL UNIQUE,
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    frames INTEGER, width INTEGER, height INTEGER, fps REAL, seconds REAL,
    at_s REAL NOT NULL
);

CREATE TABLE peak (
    id INTEGER PRIMARY KEY,
    at_s REAL NOT NULL,
    job INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    model TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, num_frames INTEGER NOT NULL,
    phase TEXT NOT NULL,
    measured_bytes INTEGER,
    measured_s REAL,
    sample TEXT
);
CREATE INDEX peak_shape ON peak(model, width, height, num_frames);

CREATE TABLE control (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    what TEXT NOT NULL,
    fields TEXT NOT NULL,
    asked_by TEXT NOT NULL,
    at_s REAL NOT NULL,
    taken_s REAL,
    outcome TEXT
);

CREATE TABLE seed (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job INTEGER,
    path TEXT UNIQUE,
    prompt TEXT NOT NULL,
    seed TEXT NOT NULL,
    model TEXT NOT NULL,
    resolution TEXT NOT NULL,
    rating TEXT NOT NULL DEFAULT '',
    note TEXT NOT NULL DEFAULT '',
    recipe TEXT NOT NULL DEFAULT '{}',
    raw TEXT NOT NULL DEFAULT '',
    created_s REAL NOT NULL
);
CREATE INDEX seed_row ON seed(seed, model);

CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL, at_s REAL NOT NULL);
