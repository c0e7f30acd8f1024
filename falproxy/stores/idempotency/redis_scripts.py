"""Lua scripts of the idempotency records in Redis, which Redis runs atomically.

All keys have the hash tag `{idempotency}`, so that a cluster keeps them on one node. A record is a
hash; `expiry` is a sorted set of records by the end of their retention, `large` one of those with a
large outcome, `size` the bytes of all records. Records have no time to live: a full server evicts
keys that have one.

Processes of several versions share a Redis server, so the names of keys and fields do not change.
"""

from falproxy.stores.idempotency import RECORD_BYTES, RETENTION, SMALL_OUTCOME_MAX
from falproxy.stores.redis_client import Script

SWEEP_BATCH_SIZE = 20  # expired records that one script deletes


# KEYS of all scripts: record, expiry, large, size.
CONSTANTS = (
    f"local RETENTION, RECORD_BYTES, SMALL_MAX, BATCH = "
    f"{RETENTION}, {RECORD_BYTES}, {SMALL_OUTCOME_MAX}, {SWEEP_BATCH_SIZE}"
)
FUNCTIONS = """
local record, expiry, large, size = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function at(seconds) return string.format('%.6f', now + seconds) end

local function delete(name)
  local bytes = redis.call('HGET', name, 'size')
  if bytes then redis.call('DECRBY', size, bytes) end
  redis.call('DEL', name)
  redis.call('ZREM', expiry, name)
  redis.call('ZREM', large, name)
end

local function resize(name, bytes)
  redis.call('INCRBY', size, bytes - redis.call('HGET', name, 'size'))
  redis.call('HSET', name, 'size', bytes)
end

local function make_room(bytes, maximum)
  while tonumber(redis.call('GET', size) or 0) + bytes > maximum do
    local oldest = redis.call('ZRANGE', large, 0, 0)[1]
    if not oldest then return false end
    redis.call('ZREM', large, oldest)
    if redis.call('HDEL', oldest, 'outcome') == 1 then resize(oldest, RECORD_BYTES) end
  end
  return true
end

for _, name in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', at(0), 'LIMIT', 0, BATCH)) do
  delete(name)
end
local kept_until = redis.call('ZSCORE', expiry, record)
if kept_until and tonumber(kept_until) <= now then delete(record) end
"""
IS_HOLDER = """
local fields = redis.call('HMGET', record, 'token', 'ended')
if fields[1] ~= ARGV[1] or fields[2] == '1' then return 0 end
"""

# ARGV: token, digest, lease, maximum of all sizes.
BEGIN = Script(
    CONSTANTS,
    FUNCTIONS,
    """
local fields = redis.call('HMGET', record, 'digest', 'token', 'sent', 'ended', 'lease_until')
if not fields[1] then
  if not make_room(RECORD_BYTES, tonumber(ARGV[4])) then return {'full'} end
  redis.call('HSET', record, 'digest', ARGV[2], 'token', ARGV[1], 'sent', '0', 'ended', '0',
    'lease_until', at(ARGV[3]), 'size', RECORD_BYTES)
  redis.call('INCRBY', size, RECORD_BYTES)
  redis.call('ZADD', expiry, at(RETENTION), record)
  return {'started'}
end
if fields[1] ~= ARGV[2] then return {'mismatch'} end
if fields[4] == '1' then
  local outcome = redis.call('HGET', record, 'outcome')
  if outcome then return {'done', outcome} end
  return {'dropped'}
end
if fields[2] == ARGV[1] then return {'started'} end
if tonumber(fields[5]) > now then return {'running'} end
if fields[3] == '1' then return {'lost'} end
redis.call('HSET', record, 'token', ARGV[1], 'lease_until', at(ARGV[3]))
return {'started'}
""",
)

# ARGV: token, lease, `1` to mark it as sent.
EXTEND = Script(
    CONSTANTS,
    FUNCTIONS,
    IS_HOLDER,
    """
if ARGV[3] == '1' then redis.call('HSET', record, 'sent', '1') end
if tonumber(redis.call('HGET', record, 'lease_until')) < now + ARGV[2] then
  redis.call('HSET', record, 'lease_until', at(ARGV[2]))
end
return 1
""",
)

# ARGV: token, maximum of all sizes, outcome if it is stored.
FINISH = Script(
    CONSTANTS,
    FUNCTIONS,
    IS_HOLDER,
    """
redis.call('HSET', record, 'ended', '1')
redis.call('ZADD', expiry, at(RETENTION), record)
local outcome = ARGV[3]
if outcome and make_room(#outcome, tonumber(ARGV[2])) then
  redis.call('HSET', record, 'outcome', outcome)
  resize(record, RECORD_BYTES + #outcome)
  if #outcome > SMALL_MAX then redis.call('ZADD', large, at(0), record) end
end
return 1
""",
)

# ARGV: token.
RELEASE = Script(CONSTANTS, FUNCTIONS, IS_HOLDER, "delete(record)", "return 1")
