-- Start leases anew. ARGV: groups of queue, number, leases. Gives the positions of those that are lost.
begin()
local lost, position, i = {}, 0, 1
while i <= #ARGV do
  local queue, first, last = queue_of(ARGV[i]), i + 2, i + 1 + ARGV[i + 1]
  local scores = queue and call('ZMSCORE', queue.leases, unpack(ARGV, first, last)) or {}
  local kept = {}
  for n = first, last do
    if scores[n - first + 1] then
      kept[#kept + 1] = number(now() + queue.lease)
      kept[#kept + 1] = ARGV[n]
    else
      lost[#lost + 1] = position
    end
    position = position + 1
  end
  if #kept > 0 then call('ZADD', queue.leases, 'XX', unpack(kept)) end
  i = last + 1
end
return lost
