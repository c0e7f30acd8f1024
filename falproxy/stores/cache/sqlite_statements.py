"""SQL statements of the SQLite store."""

SELECT_RESULT = "SELECT body, content_type, stored_at, expires_at FROM results WHERE key = ?"
SELECT_FRESH_RESULT = f"{SELECT_RESULT} AND stored_at > ? AND expires_at > ?"
SELECT_FLIGHT = (
    "SELECT token, is_run, leads_until, job_id, job_app, job_key_mark FROM flights"
    " WHERE key = ? AND kept_until > ?"
)
UPSERT_FLIGHT = """
    INSERT INTO flights (key, token, is_run, leads_until, kept_until) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET token = excluded.token, is_run = excluded.is_run,
        leads_until = excluded.leads_until, kept_until = excluded.kept_until
"""
SELECT_RESULT_BATCH = "SELECT rowid FROM results LIMIT 20"
SELECT_LEAST_RECENTLY_USED = "SELECT rowid FROM results ORDER BY used_at, rowid LIMIT 1"
SELECT_VIRTUAL_REQUEST = """
    SELECT key, owner, app, is_cancelled, job_id, job_app, job_key_mark, headers, failure_status,
        failure_type, failure_body FROM claims LEFT JOIN claim_headers USING (request_id)
    WHERE request_id = ? AND kept_until > ?
"""
SELECT_OUTCOME = "SELECT content, ended_at FROM outcomes WHERE token = ? AND key = ?"
SELECT_LAST_OUTCOME = (
    "SELECT token FROM outcomes WHERE key = ? AND kept_until > ? ORDER BY rowid DESC LIMIT 1"
)
INSERT_OUTCOME = """
    INSERT OR REPLACE INTO outcomes (token, key, ended_at, kept_until, content)
    VALUES (?, ?, ?, ?, ?)
"""
INSERT_HOLDER = "INSERT OR IGNORE INTO holders (key, holder) VALUES (?, ?)"
INSERT_RESULT = """
    INSERT INTO results (key, content_type, stored_at, expires_at, used_at, size, body)
    VALUES (?, ?, ?, ?, ?, ?, ?)
"""
INSERT_VIRTUAL_REQUEST = """
    INSERT OR REPLACE INTO claims (
        request_id, kept_until, key, owner, app, is_cancelled, job_id, job_app, job_key_mark,
        failure_status, failure_type, failure_body
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_HEADERS = "INSERT INTO claim_headers (request_id, headers) VALUES (?, ?)"
DELETE_OLD_OUTCOMES = """
    DELETE FROM outcomes WHERE rowid <= (SELECT max(rowid) FROM outcomes) - ?
"""
SELECT_STATS = """
    SELECT count(*), (SELECT size FROM total),
        (SELECT count(*) FROM flights WHERE kept_until > ?),
        (SELECT count(*) FROM claims WHERE kept_until > ?)
    FROM results
"""
