-- A receiver comes or goes. ARGV: queue, owner, by how many. Gives the topics of the queue as JSON, and whether it is ordered.
local queue = queue_of(ARGV[1])
if not queue then return redis.error_reply('NOQUEUE ' .. ARGV[1]) end
begin()
local consumers = prefix .. 'consumers:' .. ARGV[1]
if call('HINCRBY', consumers, ARGV[2], ARGV[3]) <= 0 then call('HDEL', consumers, ARGV[2]) end
return {call('HGET', prefix .. 'settings:' .. ARGV[1], 'topics'), queue.ordered and 1 or 0}
