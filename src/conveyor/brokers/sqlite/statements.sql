-- The SQL of the SQLite broker: named statements, each used once in this package. docs/wire-format.md explains the tables.
-- message.state: 0 ready, 1 leased, 2 delayed (until it is due), 3 behind an older message of its key.
-- Only who receives early leases what is delayed or behind; wherever a lease ends, the message waits as before: due, and its key, tell how.
-- message.at: since when it is ready, when its lease ends, or when it is due. Every hot question has a partial index of its own.

-- name: schema
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES ('catalog', 0);  -- grows with every change of queue or binding
CREATE TABLE owner (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, socket TEXT NOT NULL) STRICT;
CREATE TABLE queue (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, ordered INTEGER NOT NULL, max_length INTEGER,
    lease_seconds REAL NOT NULL, owner INTEGER) STRICT;  -- owner: of a temporary one
CREATE TABLE binding (topic TEXT, queue INTEGER, PRIMARY KEY (topic, queue)) STRICT, WITHOUT ROWID;
CREATE TABLE subscription (id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, queue INTEGER NOT NULL) STRICT;
CREATE TABLE message (
    seq INTEGER PRIMARY KEY,
    queue INTEGER NOT NULL,
    state INTEGER NOT NULL,
    priority INTEGER NOT NULL CHECK (priority BETWEEN 0 AND 9),
    at REAL NOT NULL,
    ordered INTEGER NOT NULL,                       -- the queue is, and it has a key
    bounded INTEGER NOT NULL,                       -- the queue has a max_length
    token INTEGER NOT NULL DEFAULT 0,               -- of the lease: random, so it never comes twice
    owner INTEGER NOT NULL DEFAULT 0,               -- of the lease
    deliveries INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    id TEXT NOT NULL,
    topic TEXT NOT NULL,
    key TEXT,
    headers TEXT,                                   -- a JSON object; NULL is none
    content_type TEXT,                              -- NULL is application/json
    correlation_id TEXT,
    causation_id TEXT,
    created REAL NOT NULL CHECK (abs(created) < 1e15),
    due REAL NOT NULL CHECK (abs(due) < 1e15),
    expires REAL CHECK (abs(expires) < 1e15),
    body BLOB NOT NULL
) STRICT;
CREATE INDEX message_ready ON message (queue, priority DESC, seq) WHERE state = 0;
CREATE INDEX message_leased ON message (queue, at) WHERE state = 1;
CREATE INDEX message_delayed ON message (queue, at) WHERE state = 2;
CREATE INDEX message_ordered ON message (queue, key, seq) WHERE ordered = 1;
CREATE INDEX message_bounded ON message (queue, seq, state, bounded) WHERE bounded = 1 AND state <> 1;
CREATE TABLE dead_letter (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL,
    reason TEXT NOT NULL,
    error TEXT NOT NULL,
    traceback TEXT NOT NULL,
    died REAL NOT NULL,
    deliveries INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT, headers TEXT, content_type TEXT, correlation_id TEXT, causation_id TEXT,
    created REAL NOT NULL, due REAL NOT NULL, expires REAL, priority INTEGER NOT NULL, body BLOB NOT NULL
) STRICT;
CREATE INDEX dead_letter_queue ON dead_letter (queue, position);
CREATE INDEX dead_letter_id ON dead_letter (id);

-- name: insert
INSERT INTO message (queue, state, priority, at, ordered, bounded, id, topic, key, headers, content_type, correlation_id, causation_id,
    created, due, expires, body) VALUES

-- name: keep_order
UPDATE message NOT INDEXED SET state = 3
WHERE seq BETWEEN ?1 AND ?2 AND ordered = 1 AND EXISTS (
    SELECT 1 FROM message AS older
    WHERE older.ordered = 1 AND older.queue = message.queue AND older.key = message.key AND older.seq < message.seq)

-- name: drop_oldest
DELETE FROM message WHERE seq IN (
    SELECT seq FROM message INDEXED BY message_bounded
    WHERE queue = ?1 AND bounded = 1 AND state <> 1 ORDER BY seq DESC LIMIT -1 OFFSET ?2)

-- name: next_of_keys
UPDATE message SET state = iif(due > ?2, 2, 0), at = max(due, ?2)
WHERE state = 3 AND seq IN (
    SELECT (SELECT min(seq) FROM message WHERE ordered = 1 AND queue = each.value ->> 0 AND key = each.value ->> 1)
    FROM json_each(?1) AS each)

-- name: next_of_queue
UPDATE message SET state = iif(due > ?2, 2, 0), at = max(due, ?2)
WHERE state = 3 AND seq IN (SELECT min(seq) FROM message WHERE ordered = 1 AND queue = ?1 GROUP BY key)

-- name: next_at
SELECT CASE WHEN EXISTS (SELECT 1 FROM message WHERE state = 0 AND queue = ?1) THEN 0.0 ELSE (
    SELECT min(at) FROM (
        SELECT min(at) AS at FROM message WHERE state = 2 AND queue = ?1
        UNION ALL SELECT min(at) FROM message WHERE state = 1 AND queue = ?1)) END

-- name: next_at_early
SELECT CASE WHEN EXISTS (SELECT 1 FROM message WHERE state = 0 AND queue = ?1)
        OR EXISTS (SELECT 1 FROM message WHERE state = 2 AND queue = ?1)
        OR EXISTS (SELECT 1 FROM message WHERE ordered = 1 AND queue = ?1 AND state = 3)
    THEN 0.0 ELSE (SELECT min(at) FROM message WHERE state = 1 AND queue = ?1) END

-- name: turned
SELECT EXISTS (SELECT 1 FROM message WHERE state = 2 AND queue = ?1 AND at <= ?2),
       EXISTS (SELECT 1 FROM message WHERE state = 1 AND queue = ?1 AND at <= ?2)

-- name: become_due
UPDATE message SET state = 0
WHERE seq IN (SELECT seq FROM message WHERE state = 2 AND queue = ?1 AND at <= ?2 ORDER BY at LIMIT ?3)

-- name: expire
UPDATE message SET state = CASE
        WHEN ordered = 1 AND EXISTS (
            SELECT 1 FROM message AS older
            WHERE older.ordered = 1 AND older.queue = message.queue AND older.key = message.key AND older.seq < message.seq) THEN 3
        WHEN due > ?2 THEN 2 ELSE 0 END, at = max(due, ?2), error = ?4
WHERE seq IN (SELECT seq FROM message WHERE state = 1 AND queue = ?1 AND at <= ?2 ORDER BY at LIMIT ?3)

-- name: claim
UPDATE message SET state = 1, at = ?2, token = ?3, owner = ?4, deliveries = deliveries + 1
WHERE seq IN (SELECT seq FROM message WHERE state = 0 AND queue = ?1 ORDER BY priority DESC, seq LIMIT ?5)

-- name: fitting
SELECT count(*) FROM (
    SELECT sum(length) OVER (ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (SELECT length(body) AS length FROM message WHERE state = 0 AND queue = ?1 ORDER BY priority DESC, seq LIMIT ?2))
WHERE bytes <= ?3

-- name: claim_early
UPDATE message SET state = 1, due = iif(state = 2, at, due), at = ?2, token = ?3, owner = ?4, deliveries = deliveries + 1
WHERE seq IN (
    SELECT * FROM (SELECT seq FROM message WHERE state = 0 AND queue = ?1 ORDER BY priority DESC, seq LIMIT ?5)
    UNION ALL SELECT * FROM (SELECT seq FROM message WHERE state = 2 AND queue = ?1 ORDER BY at LIMIT ?5)
    UNION ALL SELECT * FROM (SELECT seq FROM message WHERE ordered = 1 AND queue = ?1 AND state = 3 ORDER BY key, seq LIMIT ?5)
    LIMIT ?5)

-- name: claimed
SELECT CAST(json_group_array(json_array(seq, deliveries, attempts, error, length(body), id, topic, key, headers, content_type,
           correlation_id, causation_id, created, due, expires, priority)) AS BLOB),
       CAST(group_concat(CASE WHEN length(body) <= ?4 THEN CAST(body AS TEXT) END, '') AS BLOB),
       json_group_array(seq) FILTER (WHERE length(body) > ?4)
FROM message INDEXED BY message_leased WHERE state = 1 AND queue = ?1 AND at = ?2 AND token = ?3

-- name: bytes
SELECT sum(length(body)) FROM message WHERE seq IN (SELECT value FROM json_each(?1))

-- name: body
SELECT body FROM message WHERE seq = ?1

-- name: held
SELECT json_group_array(json_array(message.seq, message.token))
FROM json_each(?1) AS each CROSS JOIN message
WHERE message.seq = each.value ->> 0 AND message.token = each.value ->> 1 AND message.state = 1

-- name: end
DELETE FROM message WHERE seq IN (SELECT value FROM json_each(?1)) AND token = ?2 AND state = 1

-- name: bury
INSERT INTO dead_letter (queue, reason, error, traceback, died, deliveries, attempts, id, topic, key, headers, content_type,
    correlation_id, causation_id, created, due, expires, priority, body)
SELECT queue.name, each.value ->> 2, each.value ->> 3, each.value ->> 4, ?2, deliveries, attempts, message.id, topic, message.key,
    headers, content_type, correlation_id, causation_id, created, due, expires, priority, body
FROM json_each(?1) AS each CROSS JOIN message CROSS JOIN queue
WHERE message.seq = each.value ->> 0 AND message.token = each.value ->> 1 AND state = 1 AND queue.id = message.queue

-- name: keep_dead
INSERT INTO dead_letter (queue, reason, error, traceback, died, deliveries, attempts, id, topic, key, headers, content_type,
    correlation_id, causation_id, created, due, expires, priority, body)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: give_back
UPDATE message SET state = CASE
        WHEN ordered = 1 AND EXISTS (
            SELECT 1 FROM message AS older
            WHERE older.ordered = 1 AND older.queue = message.queue AND older.key = message.key AND older.seq < message.seq) THEN 3
        WHEN back.due > ?2 THEN 2 ELSE 0 END, at = max(back.due, ?2), error = coalesce(back.error, message.error),
    attempts = attempts + back.failed, deliveries = deliveries - (1 - back.failed)
FROM (SELECT value ->> 0 AS seq, value ->> 1 AS token, value ->> 2 AS due, value ->> 3 AS failed, value ->> 4 AS error FROM json_each(?1)) AS back
WHERE message.seq = back.seq AND message.token = back.token AND message.state = 1

-- name: extend
UPDATE message SET at = ?2 + (SELECT lease_seconds FROM queue WHERE queue.id = message.queue)
FROM (SELECT value ->> 0 AS seq, value ->> 1 AS token FROM json_each(?1)) AS mine
WHERE message.seq = mine.seq AND message.token = mine.token AND message.state = 1

-- name: reclaim
UPDATE message SET state = CASE
        WHEN ordered = 1 AND EXISTS (
            SELECT 1 FROM message AS older
            WHERE older.ordered = 1 AND older.queue = message.queue AND older.key = message.key AND older.seq < message.seq) THEN 3
        WHEN due > ?2 THEN 2 ELSE 0 END, at = max(due, ?2), error = coalesce(?3, error), deliveries = deliveries - ?4
WHERE state = 1 AND queue IN (SELECT id FROM queue) AND owner = ?1

-- name: purge
DELETE FROM message WHERE seq IN (
    SELECT * FROM (SELECT seq FROM message WHERE state = 0 AND queue = ?1 LIMIT ?2)
    UNION ALL SELECT * FROM (SELECT seq FROM message WHERE state = 2 AND queue = ?1 LIMIT ?2)
    UNION ALL SELECT * FROM (SELECT seq FROM message WHERE ordered = 1 AND queue = ?1 AND state = 3 LIMIT ?2))

-- name: remove_queue
DELETE FROM message WHERE state = 0 AND queue = :queue;
DELETE FROM message WHERE state = 1 AND queue = :queue;
DELETE FROM message WHERE state = 2 AND queue = :queue;
DELETE FROM message WHERE ordered = 1 AND queue = :queue;
DELETE FROM binding WHERE queue = :queue;
DELETE FROM subscription WHERE queue = :queue;
DELETE FROM queue WHERE id = :queue

-- name: receivers
SELECT socket FROM subscription JOIN owner ON owner.id = subscription.owner WHERE subscription.queue = ?1

-- name: set_bounded
UPDATE message SET bounded = ?2 WHERE queue = ?1 AND bounded <> ?2

-- name: catalog
SELECT id, name, ordered, max_length, lease_seconds, owner, (SELECT json_group_array(topic) FROM binding WHERE queue = queue.id) FROM queue

-- name: info
SELECT name, ordered, max_length, owner, lease_seconds,
    (SELECT json_group_array(topic ORDER BY topic) FROM binding WHERE binding.queue = queue.id),
    (SELECT count(*) FROM message WHERE state = 0 AND queue = queue.id),
    (SELECT count(*) FROM message WHERE state = 2 AND queue = queue.id AND at <= ?1),
    (SELECT count(*) FROM message WHERE state = 1 AND queue = queue.id AND at > ?1),
    (SELECT count(*) FROM message WHERE state = 1 AND queue = queue.id AND at <= ?1),
    (SELECT count(*) FROM message WHERE state = 2 AND queue = queue.id AND at > ?1)
        + (SELECT count(*) FROM message WHERE ordered = 1 AND queue = queue.id AND state = 3),
    (SELECT count(*) FROM dead_letter WHERE dead_letter.queue = queue.name),
    (SELECT min(at) FROM (SELECT at FROM message WHERE state = 0 AND queue = queue.id ORDER BY priority DESC, seq LIMIT 1000)),
    (SELECT min(at) FROM message WHERE state = 2 AND queue = queue.id AND at <= ?1),
    (SELECT json_group_array(socket) FROM subscription JOIN owner ON owner.id = subscription.owner WHERE subscription.queue = queue.id)
FROM queue ORDER BY name

-- name: letters
SELECT position, queue, reason, error, traceback, died, deliveries, attempts, body, id, topic, key, headers, content_type,
    correlation_id, causation_id, created, due, expires, priority
FROM dead_letter WHERE position IN (SELECT value FROM json_each(?1)) ORDER BY position

-- name: dead_letters
SELECT position, queue, reason, error, traceback, died, deliveries, attempts, body, id, topic, key, headers, content_type,
    correlation_id, causation_id, created, due, expires, priority
FROM dead_letter
WHERE position > ?1 AND (?2 IS NULL OR queue = ?2) AND (?3 IS NULL OR id = ?3) AND (?4 IS NULL OR reason = ?4)
    AND (?5 IS NULL OR instr(casefold(error), casefold(?5)))
ORDER BY position LIMIT ?6
