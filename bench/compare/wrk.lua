-- Takes the requests from the environment and prints the results as one line of JSON. Requests without
-- a body name one job after the other; those with a body differ in its length.
wrk.method = os.getenv("BENCH_METHOD")
wrk.path = os.getenv("BENCH_PATH")
local body = os.getenv("BENCH_BODY")
if body ~= "" then
  wrk.body = body
end
for name, value in os.getenv("BENCH_HEADERS"):gmatch("([^:\n]+): ([^\n]+)") do
  wrk.headers[name] = value
end

local WORDS = "a lighthouse at dusk, "
local LENGTHS = 10
local requests = {}

function init(args)
  local target, first = wrk.headers["x-fal-target-url"], nil
  if wrk.body then
    for number = 0, LENGTHS - 1 do
      local body = wrk.body:gsub(WORDS, WORDS:sub(number + 1), 1)
      requests[#requests + 1] = wrk.format(nil, nil, nil, body)
    end
    return
  end
  for job in os.getenv("BENCH_JOBS"):gmatch("%S+") do
    first = first or job
    local place = target:find(first, 1, true)
    wrk.headers["x-fal-target-url"] = place
      and target:sub(1, place - 1) .. job .. target:sub(place + #first) or target
    requests[#requests + 1] = wrk.format()
  end
end

local turn = 0
function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "bytes": %d, "status": %d, "broken": %d}\n',
    summary.requests, summary.bytes, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout
  ))
end
