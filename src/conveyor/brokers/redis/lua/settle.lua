-- End deliveries. ARGV: sender, number of this batch, then settlements, each: queue, verdict, and
--   F  number, leases                       done, nothing to emit, not ordered: many at once
--   D  lease, key, number of emits, emits   done (see publish() in queue.lua)
--   R  lease, key, due, error               again, counted
--   L  lease, key, due                      released
--   X  lease, key, reason, error, traceback dead
-- Gives the positions of those whose lease is lost. A batch that comes again, because its answer was lost, gives the first answer.
local mine = prefix .. 'sent:' .. ARGV[1] .. ':settle'
local before = call('GET', mine)
if before then
  local last, lost = match(before, '^(%d+) (.*)$')
  if tonumber(last) >= tonumber(ARGV[2]) then return cjson.decode(lost) end
end
begin()
local lost, position, i = {}, 0, 3

local function is_lost()
  lost[#lost + 1] = position
end

while i <= #ARGV do
  local queue, verdict = queue_of(ARGV[i]), ARGV[i + 1]
  if verdict == 'F' then
    local first, last = i + 3, i + 2 + ARGV[i + 2]
    if queue then
      local scores = call('ZMSCORE', queue.leases, unpack(ARGV, first, last))
      local ours, kept, counted = {}, {}, {}
      for n = first, last do
        if scores[n - first + 1] then
          local lease = ARGV[n]
          local space = find(lease, ' ', 1, true)
          local id = sub(lease, 1, space - 3)
          if sub(lease, space - 2, space - 2) == 'm' then ours[#ours + 1] = id else kept[#kept + 1] = id end
          if space == 23 then counted[#counted + 1] = sub(lease, 1, 22) end -- in full: it waited, and was counted
        else
          is_lost()
        end
        position = position + 1
      end
      call('ZREM', queue.leases, unpack(ARGV, first, last))
      if #ours > 0 then call('XDEL', queue.fresh, unpack(ours)) end
      if #kept > 0 then call('XDEL', queue.kept, unpack(kept)) end
      if #counted > 0 then call('HDEL', queue.counts, unpack(counted)) end
    else
      for _ = first, last do
        is_lost()
        position = position + 1
      end
    end
    i = last + 1
  else
    local lease, key = ARGV[i + 2], ARGV[i + 3]
    local held = queue and call('ZSCORE', queue.leases, lease)
    local ref = held and reference_of(lease)
    local hash = held and hash_of_held(queue, ref, key)
    if not held then is_lost() end
    if verdict == 'D' then
      local emits = tonumber(ARGV[i + 4])
      i = i + 5
      for _ = 1, emits do
        if held then i = publish(i) else i = i + 6 + ARGV[i + 5] end
      end
      if held then
        call('ZREM', queue.leases, lease)
        delete(queue, ref)
        next_of(queue, ref, hash)
      end
    elseif verdict == 'R' then
      if held then
        call('ZREM', queue.leases, lease)
        local deliveries, attempts = counts_of(queue, ref)
        count(queue, ref, deliveries + 1, attempts + 1, now(), ARGV[i + 5])
        give(queue, ref, tonumber(ARGV[i + 4]), hash)
        if queue.max then touched[queue] = true end
      end
      i = i + 6
    elseif verdict == 'L' then
      if held then
        call('ZREM', queue.leases, lease)
        give(queue, ref, math.max(tonumber(ARGV[i + 4]), due_of(lease)), hash)
        if queue.max then touched[queue] = true end
      end
      i = i + 5
    else
      if held then
        local fields = fields_of(queue, ref)
        if fields then
          local deliveries, attempts = counts_of(queue, ref)
          call('XADD', queue.dead, '*', 'dead_reason', ARGV[i + 4], 'dead_error', ARGV[i + 5], 'dead_traceback', ARGV[i + 6],
            'dead_deliveries', deliveries + 1, 'dead_attempts', attempts, 'dead_time', number(now()), unpack(packed(fields)))
        end
        call('ZREM', queue.leases, lease)
        delete(queue, ref)
        next_of(queue, ref, hash)
      end
      i = i + 7
    end
    position = position + 1
  end
end
keep_bounds()
note(mine, before, ARGV[2] .. ' ' .. (#lost > 0 and cjson.encode(lost) or '[]'))
return lost
