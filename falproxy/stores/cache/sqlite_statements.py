"""What the SQLite store asks of its file."""

RESULT = "SELECT body, content_type, stored_at, expires_at FROM results WHERE key = ?"
FRESH = f"{RESULT} AND stored_at > ? AND expires_at > ?"
FLIGHT = (
    "SELECT token, is_run, leads_until, job_id, job_app, job_key_mark FROM flights"
    " WHERE key = ? AND kept_until > ?"
)
LEAD = """
    INSERT INTO flights (key, token, is_run, leads_until, kept_until) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET token = excluded.token, is_run = excluded.is_run,
        leads_until = excluded.leads_until, kept_until = excluded.kept_until
"""
SOME = "SELECT rowid FROM results LIMIT 20"
OLDEST = "SELECT rowid FROM results ORDER BY used_at, rowid LIMIT 1"
CLAIM = """
    SELECT key, owner, app, is_cancelled, job_id, job_app, job_key_mark, failure_status,
        failure_type, failure_body FROM claims WHERE request_id = ? AND kept_until > ?
"""
STATS = """
    SELECT count(*), (SELECT size FROM total),
        (SELECT count(*) FROM flights WHERE kept_until > ?),
        (SELECT count(*) FROM claims WHERE kept_until > ?)
    FROM results
"""
