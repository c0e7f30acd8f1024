"""Lua scripts of the limits in Redis, which Redis runs atomically.

All keys have the hash tag `{limits}`, so that a cluster keeps them on one node. A rate is a hash
of the parts of its window, concurrency a sorted set of tokens by the end of their lease, a budget a
number for each window, a reservation a hash, and `open` a sorted set of tokens by the time at which
they are due.

No key has a time to live: a full server evicts keys that have one, and an evicted budget would be
spent again. `expiry` is a sorted set of all keys by the time at which they are deleted.

Processes of several versions share a Redis server, so the names of keys and fields do not change.
"""

from falproxy.stores.limits import BUDGET_GRACE, RATE_PARTS, RESERVATION_RETENTION
from falproxy.stores.redis_client import Script

EXPIRY_BATCH_SIZE = 500  # keys that one script deletes

NOW = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
"""
# `read_states` reads ARGV from a position on: number of limits, and for each one kind, maximum and
# amount of the call; then for a rate the length of a part, for a budget start and end of three
# windows around the time of the caller. KEYS from a position on: one for each limit, three for a
# budget. It returns nil if the store's time is in none of the windows.
READ_STATES = (
    f"local PARTS = {RATE_PARTS}"
    """
local function read_rate(limit, key, part)
  local counts, recent = redis.call('HGETALL', key), {}
  local current, used, seconds = math.floor(now / part), 0, 0
  limit.expired = {}
  for i = 1, #counts, 2 do
    local number, count = tonumber(counts[i]), tonumber(counts[i + 1])
    if number >= current - PARTS then
      recent[#recent + 1] = {number, count}
      used = used + count
    else
      limit.expired[#limit.expired + 1] = counts[i]
    end
  end
  table.sort(recent, function(a, b) return a[1] < b[1] end)
  local left = used
  for _, pair in ipairs(recent) do
    seconds = (pair[1] + PARTS + 1) * part - now
    left = left - pair[2]
    if left < limit.maximum then break end
  end
  limit.key, limit.part, limit.current = key, part, current
  limit.used, limit.seconds = used, seconds
end

local function read_states(key, arg)
  local limits = {}
  for _ = 1, tonumber(ARGV[arg]) do
    local limit = {
      kind = ARGV[arg + 1], maximum = tonumber(ARGV[arg + 2]), share = tonumber(ARGV[arg + 3])
    }
    arg = arg + 3
    if limit.kind == 'rate' then
      read_rate(limit, KEYS[key], tonumber(ARGV[arg + 1]))
      key, arg = key + 1, arg + 1
    elseif limit.kind == 'concurrency' then
      limit.key, limit.seconds = KEYS[key], 1
      limit.used = redis.call('ZCOUNT', limit.key, string.format('(%.6f', now), '+inf')
      key = key + 1
    else
      for i = 0, 2 do
        local start, finish = tonumber(ARGV[arg + 1 + 2 * i]), tonumber(ARGV[arg + 2 + 2 * i])
        if start <= now and now < finish then
          limit.key, limit.seconds, limit.finish = KEYS[key + i], finish - now, finish
          limit.used = tonumber(redis.call('GET', limit.key) or 0)
        end
      end
      if not limit.key then return nil end
      key, arg = key + 3, arg + 6
    end
    limits[#limits + 1] = limit
  end
  return limits
end

local function reply(refused, limits)
  local states = {}
  for _, limit in ipairs(limits) do
    states[#states + 1] = string.format('%d', limit.used)
    states[#states + 1] = string.format('%.6f', limit.seconds)
  end
  return {refused, string.format('%.6f', now), states}
end
"""
)
WRONG_CLOCK = "if not limits then return {-2, string.format('%.6f', now)} end"

# KEYS: limits. ARGV: limits.
COUNT = Script(
    NOW, READ_STATES, "local limits = read_states(1, 1)", WRONG_CLOCK, "return reply(-1, limits)"
)

# KEYS: reservation, open, expiry, limits. ARGV: token, amount, lease, limits.
RESERVE = Script(
    NOW,
    READ_STATES,
    "local limits = read_states(4, 4)",
    WRONG_CLOCK,
    f"local RETENTION, BUDGET_GRACE = {RESERVATION_RETENTION}, {BUDGET_GRACE}",
    """
local function expire(key, at)
  redis.call('ZADD', KEYS[3], string.format('%d', math.ceil(at)), key)
end
if redis.call('EXISTS', KEYS[1]) == 1 then return reply(-1, limits) end -- the reply was lost
for i, limit in ipairs(limits) do
  if limit.used + limit.share > limit.maximum then return reply(i - 1, limits) end
end
local due, budgets, running = string.format('%.6f', now + ARGV[3]), {}, {}
for _, limit in ipairs(limits) do
  if limit.kind == 'rate' then
    if #limit.expired > 0 then redis.call('HDEL', limit.key, unpack(limit.expired)) end
    redis.call('HINCRBY', limit.key, string.format('%d', limit.current), 1)
    expire(limit.key, now + (PARTS + 1) * limit.part)
    if limit.used == 0 then limit.seconds = (limit.current + PARTS + 1) * limit.part - now end
  elseif limit.kind == 'concurrency' then
    redis.call('ZREMRANGEBYSCORE', limit.key, '-inf', string.format('%.6f', now))
    redis.call('ZADD', limit.key, due, ARGV[1])
    expire(limit.key, now + RETENTION)
    running[#running + 1] = limit.key
  else
    redis.call('INCRBY', limit.key, ARGV[2])
    expire(limit.key, limit.finish + BUDGET_GRACE)
    budgets[#budgets + 1] = limit.key
  end
  limit.used = limit.used + limit.share
end
if #budgets + #running > 0 then
  redis.call('HSET', KEYS[1], 'amount', ARGV[2], 'budgets', table.concat(budgets, '\\n'),
    'running', table.concat(running, '\\n'), 'created', string.format('%.6f', now))
  expire(KEYS[1], now + RETENTION)
  redis.call('ZADD', KEYS[2], due, ARGV[1])
end
return reply(-1, limits)
""",
)

# The names of the counters are read from the reservation: all of them have the same hash tag.
READ_NAMES = """
local function names(field)
  return string.gmatch(redis.call('HGET', KEYS[1], field) or '', '[^\\n]+')
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 0
end
"""
# KEYS: reservation, open, expiry, request. ARGV: token, request id, details, lease.
ATTACH = Script(
    NOW,
    READ_NAMES,
    f"local RETENTION = {RESERVATION_RETENTION}",
    """
redis.call('HSET', KEYS[1], 'request', KEYS[4], 'request_id', ARGV[2], 'details', ARGV[3])
redis.call('SET', KEYS[4], ARGV[1])
redis.call('ZADD', KEYS[3], string.format('%d', now + RETENTION), KEYS[4])
redis.call('ZADD', KEYS[2], string.format('%.6f', now + ARGV[4]), ARGV[1])
for name in names('running') do
  redis.call('ZADD', name, string.format('%.6f', now + RETENTION), ARGV[1])
end
return 1
""",
)

# KEYS: reservation, open. ARGV: token, lease.
RENEW = Script(
    NOW,
    READ_NAMES,
    """
local due = string.format('%.6f', now + ARGV[2])
redis.call('ZADD', KEYS[2], due, ARGV[1])
for name in names('running') do redis.call('ZADD', name, 'GT', due, ARGV[1]) end
return 1
""",
)

# KEYS: reservation, open, expiry. ARGV: token, amount.
SETTLE = Script(
    READ_NAMES,
    """
local difference = string.format('%d', ARGV[2] - redis.call('HGET', KEYS[1], 'amount'))
for name in names('budgets') do
  if redis.call('EXISTS', name) == 1 then redis.call('INCRBY', name, difference) end
end
for name in names('running') do redis.call('ZREM', name, ARGV[1]) end
for name in names('request') do
  redis.call('DEL', name)
  redis.call('ZREM', KEYS[3], name)
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[3], KEYS[1])
return 1
""",
)

# KEYS: reservation, open. ARGV: token.
LOAD = Script(
    NOW,
    READ_NAMES,
    """
local fields = redis.call('HMGET', KEYS[1], 'amount', 'request_id', 'details', 'created')
fields[4] = string.format('%.6f', now - fields[4])
return fields
""",
)

# Deletes keys that have expired, too. KEYS: open, expiry. ARGV: number of reservations, lease.
CLAIM_DUE = Script(
    NOW,
    f"local EXPIRY_BATCH_SIZE = {EXPIRY_BATCH_SIZE}",
    """
local seconds = string.format('%d', now)
local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', seconds, 'LIMIT', 0, EXPIRY_BATCH_SIZE)
for _, key in ipairs(expired) do redis.call('DEL', key) end
if #expired > 0 then redis.call('ZREM', KEYS[2], unpack(expired)) end
local tokens = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.6f', now),
  'LIMIT', 0, ARGV[1])
for _, token in ipairs(tokens) do
  redis.call('ZADD', KEYS[1], string.format('%.6f', now + ARGV[2]), token)
end
return tokens
""",
)
