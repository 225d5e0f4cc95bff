-- Put dead letters back. ARGV: pairs of queue and id. Gives how many there still were.
local moved = 0
for i = 1, #ARGV, 2 do
  local queue, id = queue_of(ARGV[i]), ARGV[i + 1]
  local found = queue and call('XRANGE', queue.dead, id, id)[1]
  if found then
    local fields, _, priority, key = {}, way_of(found[2])
    for f = 13, #found[2], 2 do
      local name = found[2][f]
      if name ~= 'ce_duetime' and name ~= 'ce_expirytime' then
        fields[#fields + 1] = name
        fields[#fields + 1] = found[2][f + 1]
      end
    end
    put(queue, fields, 1, #fields, 0, priority, hash_of(key))
    call('XDEL', queue.dead, id)
    if queue.max then touched[queue] = true end
    moved = moved + 1
  end
end
keep_bounds()
return moved
