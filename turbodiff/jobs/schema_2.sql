-- What version 2 adds: how often a job was passed by outlives a restart, and what was measured says on which card.
ALTER TABLE job ADD COLUMN overtaken INTEGER NOT NULL DEFAULT 0;
ALTER TABLE peak ADD COLUMN gpu TEXT NOT NULL DEFAULT '';
ALTER TABLE peak ADD COLUMN gpu_bytes INTEGER NOT NULL DEFAULT 0;
-- the samples of version 1 name their card
UPDATE peak SET gpu = coalesce(json_extract(sample, '$.kind.gpu'), ''),
    gpu_bytes = CAST(coalesce(json_extract(sample, '$.kind.total_bytes'), 0) AS INTEGER)
    WHERE sample IS NOT NULL AND json_valid(sample);
