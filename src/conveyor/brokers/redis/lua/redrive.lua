-- Put dead letters back. ARGV: pairs of queue and id. Gives how many there still were.
local moved = 0

-- The message's own fields: behind what it is dead of (any program may write there, so some of that may be missing).
local function message_in(letter)
  local about = {
    dead_reason = true, dead_error = true, dead_traceback = true, dead_deliveries = true, dead_attempts = true, dead_time = true,
  }
  local fields, first = {}, 1
  while about[letter[first]] do
    about[letter[first]] = nil
    first = first + 2
  end
  for i = first, #letter do fields[#fields + 1] = letter[i] end
  return unpacked(fields)
end

for i = 1, #ARGV, 2 do
  local queue, id = queue_of(ARGV[i]), ARGV[i + 1]
  local found = queue and call('XRANGE', queue.dead, id, id)[1]
  if found then
    local all, fields = message_in(found[2]), {}
    for f = 1, #all, 2 do
      local name = all[f]
      if name ~= 'ce_duetime' and name ~= 'ce_expirytime' then
        fields[#fields + 1] = name
        fields[#fields + 1] = all[f + 1]
      end
    end
    if #fields == 0 then fields = {'body', ''} end
    local _, priority, key = way_of(fields)
    fields = packed(fields)
    put(queue, fields, 1, #fields, 0, priority, hash_of(key))
    call('XDEL', queue.dead, id)
    if queue.max then touched[queue] = true end
    moved = moved + 1
  end
end
keep_bounds()
return moved
