-- Give back what an owner leased. ARGV: owner, 1 where the deliveries count, why, then the queues; none is all of them.
-- Gives how many. A lease is: reference, number of the claim (with @ and when it is due, where it was given early), owner.
local owner, counted, why = ARGV[1], ARGV[2] == '1', ARGV[3]
local names = {unpack(ARGV, 4)}
if #names == 0 then names = call('SMEMBERS', KEYS[1]) end
local given = 0
for _, name in ipairs(names) do
  local queue = queue_of(name)
  if queue then
    local back = {}
    for _, lease in ipairs(call('ZRANGE', queue.leases, 0, -1)) do
      if match(lease, '^%S+ %d+@?%d* (.*)$') == owner then back[#back + 1] = lease end
    end
    table.sort(back, function(one, other) return reference_of(one) < reference_of(other) end)
    for _, lease in ipairs(back) do come_back(queue, lease, counted, why) end
    if queue.max then drop(queue) end
    given = given + #back
  end
end
return given
