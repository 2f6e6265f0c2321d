-- What wrk sends, and the one line of JSON that it answers.
--   wrk ... -s serve.lua URL -- PICTURES   a file with one JSON body per line

local bodies, turn = {}, 0

function init(args)
   for line in io.lines(args[1]) do
      bodies[#bodies + 1] = wrk.format("POST", nil, {
         ["Content-Type"] = "application/json"
      }, line)
   end
end

function request()
   turn = turn % #bodies + 1
   return bodies[turn]
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\n{"seconds": %.6f, "answered": %d, "p50": %.6f, "p90": %.6f, "p99": %.6f, ' ..
      '"max": %.6f, "refused": %d, "broken": %d, "timeouts": %d}\n',
      summary.duration / 1e6, summary.requests,
      latency:percentile(50) / 1e6, latency:percentile(90) / 1e6,
      latency:percentile(99) / 1e6, latency.max / 1e6, errors.status,
      errors.connect + errors.read + errors.write, errors.timeout))
end
