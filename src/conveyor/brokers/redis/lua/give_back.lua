-- Give back what an owner leased in a queue, a part of it at a time. ARGV: owner, 1 where the deliveries count, why, queue, cursor (0 begins).
-- Gives how many, and the next cursor (0 is the end).
local owner, counted, why, queue = ARGV[1], ARGV[2] == '1', ARGV[3], queue_of(ARGV[4])
if not queue then return {0, '0'} end
begin()
local given, cursor = give_back(queue, owner, nil, ARGV[5], counted, why)
if queue.max then drop(queue) end
return {given, cursor}
