-- Delete up to limit messages that wait. ARGV: queue, limit. Gives how many; fewer than limit means that none is left.
local queue, left = queue_of(ARGV[1]), tonumber(ARGV[2])
if not queue then return redis.error_reply('NOQUEUE ' .. ARGV[1]) end
local gone = 0
-- What waits behind goes first, so that none gets its turn only to be deleted.
local behind = call('ZRANGE', queue.behind, 0, left - 1)
for _, member in ipairs(behind) do
  call('ZREM', queue.behind, member)
  delete(queue, sub(member, 41))
end
gone = #behind
for _, waiting in ipairs({queue.ready, queue.later}) do
  for _, ref in ipairs(gone < left and call('ZRANGE', waiting, 0, left - gone - 1) or {}) do
    local hash = key_hash(queue, ref)
    call('ZREM', waiting, ref)
    delete(queue, ref)
    next_of(queue, ref, hash)
    gone = gone + 1
  end
end
if gone < left then
  local read = call('XREADGROUP', 'GROUP', 'conveyor', 'all', 'COUNT', left - gone, 'NOACK', 'STREAMS', queue.fresh, '>')
  if read then
    for _, entry in ipairs(read[1][2]) do call('XDEL', queue.fresh, entry[1]) end
    gone = gone + #read[1][2]
  end
end
return gone
