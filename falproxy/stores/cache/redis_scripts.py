"""Lua scripts of the Redis store, which Redis runs atomically, and parsers of their replies.

KEYS are the result and the flight of one cache key, both hashes; the token of the leader whose
outcome was recorded last; and one outcome, a hash. A flight has the fields token, run and until;
with a job also id, app and mark, and one field for each holder. An outcome has the token of its
leader in its name, and the fields content and at.

Processes of several versions share a Redis server, so the names of keys and fields do not change.
"""

import json
from dataclasses import asdict

from falproxy.json_object import known_fields
from falproxy.stores.cache import (
    CachedResult,
    Job,
    Lookup,
    SharedCallRecord,
    SharedFailure,
    SharedOutcome,
    VirtualRequest,
)
from falproxy.stores.redis_client import Script

NOW = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
"""
# KEYS: the processes by the time of their last complete report. ARGV: the id of this process, 1 if
# it has no unwritten entries, seconds after which a silent process does not count. The reply is the
# age of the oldest report.
REPORT_PROCESS = Script(
    NOW,
    """
local silence = tonumber(ARGV[3])
if ARGV[2] == '1' then
    redis.call('ZADD', KEYS[1], now, ARGV[1])
else
    local last = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0)
    redis.call('ZADD', KEYS[1], math.max(last, now - silence / 2), ARGV[1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - silence)
redis.call('PEXPIRE', KEYS[1], 2000 * silence)
local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return tostring(now - tonumber(oldest[2]))
""",
)
READ_STATE = """
local function result()
  return redis.call('HMGET', KEYS[1], 'body', 'type', 'stored', 'expires')
end
local function flight()
  return redis.call('HMGET', KEYS[2], 'token', 'run', 'until', 'id', 'app', 'mark')
end
local function reply(is_leader, result, flight, outcome)
  local last = redis.call('GET', KEYS[3]) or ''
  return {is_leader, string.format('%.6f', now), result, flight, outcome or {}, last}
end
"""
REQUIRE_LEADER = """
if redis.call('HGET', KEYS[2], 'token') ~= ARGV[1] then return 0 end
"""

GET = Script(NOW, READ_STATE, "return reply(0, result(), flight())")

# KEYS[4]: the outcome of the leader for which the caller has waited.
# ARGV: token, lease, is_run, min_stored_at, retention in seconds without a job, and with one; for a
# repeated call awaited_token and known_outcome.
ACQUIRE = Script(
    NOW,
    READ_STATE,
    """
local current = flight()
local has_leader = current[1] and tonumber(current[3]) > now
if not (has_leader and current[1] == ARGV[1]) then
  local outcome = redis.call('HMGET', KEYS[4], 'content', 'at')
  if outcome[1] then return reply(0, {}, {}, outcome) end
  local times = redis.call('HMGET', KEYS[1], 'stored', 'expires')
  if times[1] and tonumber(times[1]) > tonumber(ARGV[4]) and tonumber(times[2]) > now then
    return reply(0, result(), {})
  end
  if has_leader then return reply(0, {}, current) end
  local last = redis.call('GET', KEYS[3])
  if ARGV[8] and last and last ~= ARGV[7] and last ~= ARGV[8] then return reply(0, {}, {}) end
end
local job = current[4]
redis.call('HSET', KEYS[2], 'token', ARGV[1], 'run', job and '0' or ARGV[3],
  'until', string.format('%.6f', now + ARGV[2]))
local retention = job and math.max(ARGV[2], ARGV[6]) or ARGV[2] + ARGV[5]
redis.call('PEXPIRE', KEYS[2], math.ceil(retention * 1000))
return reply(1, {}, flight())
""",
)

# ARGV: token, channel, cache key, the job's id, app and mark, retention in seconds.
RECORD_JOB = Script(
    REQUIRE_LEADER,
    """
local times = redis.call('HMGET', KEYS[2], 'until', 'id')
if times[2] and times[2] ~= ARGV[4] then
  redis.call('DEL', KEYS[2])
end
redis.call('HSET', KEYS[2], 'token', ARGV[1], 'run', '0', 'until', times[1],
  'id', ARGV[4], 'app', ARGV[5], 'mark', ARGV[6], 'holder:' .. ARGV[4], '')
redis.call('PEXPIRE', KEYS[2], math.ceil(ARGV[7] * 1000))
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1
""",
)

# ARGV: token, channel, cache key, lease, retention in seconds without a job, and with one.
RENEW_LEASE = Script(
    REQUIRE_LEADER,
    NOW,
    """
redis.call('HSET', KEYS[2], 'until', string.format('%.6f', now + ARGV[4]))
local has_job = redis.call('HEXISTS', KEYS[2], 'id') == 1
local retention = has_job and math.max(ARGV[4], ARGV[6]) or ARGV[4] + ARGV[5]
redis.call('PEXPIRE', KEYS[2], math.ceil(retention * 1000))
if tonumber(ARGV[4]) == 0 then redis.call('PUBLISH', ARGV[2], ARGV[3]) end
return 1
""",
)

# KEYS[4]: the outcome of the caller.
# ARGV: token, channel, cache key, the outcome's content, age and retention in seconds; with a
# result also its body, content type, stored_at, expires_at, and the time of its deletion in
# milliseconds. Content is empty if there is no outcome. If the result cannot be stored, the shared
# call ends nevertheless, and the reply is the error. A Redis server without memory accepts an
# outcome only after the deletion of the flight.
FINISH = Script(
    NOW,
    """
local stored = 1
if ARGV[7] then
  stored = redis.pcall('HSET', KEYS[1], 'body', ARGV[7], 'type', ARGV[8], 'stored', ARGV[9],
    'expires', ARGV[10])
  if type(stored) ~= 'table' then redis.call('PEXPIREAT', KEYS[1], ARGV[11]) end
end
local is_leader = redis.call('HGET', KEYS[2], 'token') == ARGV[1]
if is_leader then redis.call('DEL', KEYS[2]) end
local is_stored = ARGV[7] and type(stored) ~= 'table'
if is_leader and ARGV[4] ~= '' and not is_stored then
  local ended_at = string.format('%.6f', now - ARGV[5])
  redis.pcall('HSET', KEYS[4], 'content', ARGV[4], 'at', ended_at)
  redis.pcall('SET', KEYS[3], ARGV[1])
  for i = 3, 4 do redis.call('PEXPIRE', KEYS[i], math.ceil(ARGV[6] * 1000)) end
end
redis.call('PUBLISH', ARGV[2], ARGV[3])
return stored
""",
)

# ARGV: job id, holder.
ADD_HOLDER = Script("""
if redis.call('HGET', KEYS[2], 'id') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], 'holder:' .. ARGV[2], '')
return 1
""")

# ARGV: job id, holder, channel, cache key. The hash of a shared call with a job has six fields
# besides its holders.
REMOVE_HOLDER = Script("""
if redis.call('HGET', KEYS[2], 'id') ~= ARGV[1] then return 2 end
redis.call('HDEL', KEYS[2], 'holder:' .. ARGV[2])
if redis.call('HLEN', KEYS[2]) > 6 then return 0 end
redis.call('DEL', KEYS[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1
""")


def parse_lookup(reply: object) -> Lookup:
    assert isinstance(reply, list)
    is_leader, now, result_fields, flight_fields, outcome_fields, last_outcome = reply
    result = shared_call = outcome = None
    if result_fields and result_fields[0] is not None:
        body, content_type, stored_at, expires_at = result_fields
        result = CachedResult(body, content_type.decode(), float(stored_at), float(expires_at))
    if flight_fields and flight_fields[0] is not None:
        token, is_run, until, *job_fields = flight_fields
        job = None if job_fields[0] is None else Job(*(field.decode() for field in job_fields))
        lease_left = float(until) - float(now)
        shared_call = SharedCallRecord(token.decode(), is_run == b"1", job, lease_left)
    if outcome_fields:
        content, ended_at = outcome_fields
        outcome = SharedOutcome(content, float(now) - float(ended_at))
    return Lookup(result, shared_call, is_leader == 1, outcome, last_outcome.decode())


def serialize_virtual_request(virtual_request: VirtualRequest) -> bytes:
    """Return a line of JSON, followed by the body of the failure if there is one."""
    fields = asdict(virtual_request)
    body = fields["failure"].pop("body") if fields["failure"] else b""
    return json.dumps(fields).encode() + b"\n" + bytes(body)


def parse_virtual_request(value: bytes) -> VirtualRequest:
    line, _, body = value.partition(b"\n")
    fields = json.loads(line)
    job, failure = fields.pop("job"), fields.pop("failure")
    if failure:
        # Earlier versions store no headers.
        failure["headers"] = tuple((name, value) for name, value in failure.get("headers", ()))
    return VirtualRequest(
        **known_fields(VirtualRequest, fields),
        job=Job(**known_fields(Job, job)) if job else None,
        failure=SharedFailure(**known_fields(SharedFailure, failure), body=body)
        if failure
        else None,
    )
