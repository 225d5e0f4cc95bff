-- A claim whose answer nobody hears: it takes nothing if it is still on its way, and what it took is given back, uncounted.
-- ARGV: owner, number of the claim, queue.
local owner, claim, queue = ARGV[1], ARGV[2], queue_of(ARGV[3])
begin()
call('SET', prefix .. 'void:' .. owner .. ':' .. claim, '1', 'EX', 3600)
if not queue then return 0 end
local back = {}
for _, lease in ipairs(call('ZRANGE', queue.leases, 0, -1)) do
  local by, whose = match(lease, '^%S+ (%d+)@?%d* (.*)$')
  if by == claim and whose == owner then back[#back + 1] = lease end
end
table.sort(back, function(one, other) return reference_of(one) < reference_of(other) end)
for _, lease in ipairs(back) do come_back(queue, lease, false, '') end
if queue.max then drop(queue) end
return #back
