-- A claim whose answer nobody hears: it takes nothing if it is still on its way, and what it took is given back, uncounted.
-- ARGV: owner, number of the claim, queue, cursor (0 begins). Gives the next cursor (0 is the end).
local owner, claim, queue = ARGV[1], ARGV[2], queue_of(ARGV[3])
begin()
if ARGV[4] == '0' then call('SET', prefix .. 'void:' .. owner .. ':' .. claim, '1', 'EX', 3600) end
if not queue then return '0' end
local _, cursor = give_back(queue, owner, claim, ARGV[4], false, '')
if queue.max then drop(queue) end
return cursor
