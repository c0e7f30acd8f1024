-- Takes the requests from the environment and prints the results as one line of JSON.
-- In a head, @JOB@ stands for the request id and @USER@ for the user whose browser sends it.
local path, body = os.getenv("BENCH_PATH"), os.getenv("BENCH_BODY")
local method, target = os.getenv("BENCH_METHOD"), os.getenv("BENCH_TARGET")
local plan = os.getenv("BENCH_PLAN")
local WORDS, LENGTHS = "a lighthouse at dusk, ", 10
local USERS = 64
local POLLS = 12 -- of each job in the mixed plan
local jobs, common = {}, {}
for name, value in os.getenv("BENCH_HEADERS"):gmatch("([^:\n]+): ([^\n]+)") do
  common[name] = value
end
for job in os.getenv("BENCH_JOBS"):gmatch("%S+") do
  jobs[#jobs + 1] = job
end

-- The requests before the ids are filled in, created in `init`: Host is not known earlier.
local poll, result, submits = nil, nil, {}

local function template(method, target, body)
  local headers = { ["x-fal-target-url"] = target }
  for name, value in pairs(common) do
    headers[name] = value
  end
  if body then
    headers["content-type"] = "application/json"
  end
  return wrk.format(method, path, headers, body)
end

function init(args)
  math.randomseed(os.time() + tonumber(tostring({}):sub(8), 16) % 100000)
  for number = 0, body ~= "" and LENGTHS - 1 or -1 do
    local shorter = body:gsub(WORDS, WORDS:sub(number + 1), 1)
    submits[#submits + 1] = template("POST", os.getenv("BENCH_SUBMIT"), shorter)
  end
  if method == "GET" then
    poll = template("GET", target)
    result = template("GET", os.getenv("BENCH_RESULT"))
  end
end

local function fill(text, job, user)
  return (text:gsub("@%u+@", { ["@JOB@"] = job, ["@USER@"] = string.format("%08d", user) }))
end

local function new_job()
  local random = math.random
  return string.format("%08x-%04x-4%03x-a%03x-%06x%06x", random(0, 0x7fffffff), random(0, 0xffff),
    random(0, 0xfff), random(0, 0xfff), random(0, 0xffffff), random(0, 0xffffff))
end

local turn, pair = 0, {}
local plans = {}

-- The jobs are polled in turn; each belongs to a user.
function plans.turns()
  local place = turn % #jobs
  return fill(poll, jobs[place + 1], math.floor(place * USERS / #jobs))
end

-- Each poll is of another job, of one of the users.
function plans.new()
  return fill(poll, new_job(), turn % USERS)
end

-- Each poll is of another job and comes from another browser.
function plans.strangers()
  return fill(poll, new_job(), math.random(0, 99999999))
end

function plans.submits()
  return fill(submits[turn % LENGTHS + 1], "", turn % USERS)
end

-- Two jobs at a time: their polls with submits and results between them, 80 %, 10 % and 10 %.
function plans.mixed()
  local length = 2 * POLLS * 10 / 8
  local place, user = turn % length, math.floor(turn / length) % USERS
  if place == 0 then
    pair = { new_job(), new_job() }
  end
  if place % 10 == 4 then
    return fill(submits[turn % LENGTHS + 1], "", user)
  end
  return fill(place % 10 == 9 and result or poll, pair[place % 2 + 1], user)
end

function request()
  local text = plans[plan]()
  turn = turn + 1
  return text
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "bytes": %d, "status": %d, "broken": %d}\n',
    summary.requests, summary.bytes, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout
  ))
end
