-- Publish a batch. ARGV: sender, number of this batch, then the messages (see publish() in queue.lua).
-- Gives the positions of those whose topic no queue has, and of those whose queue is not there.
-- A batch that comes again, because its answer was lost, does nothing.
local mine = prefix .. 'sent:' .. ARGV[1] .. ':publish'
local before = call('GET', mine)
local again = before and tonumber(before) >= tonumber(ARGV[2])

-- Nearly always: one message, for one queue, that goes to its end. It is on its way before the rest is defined.
if #ARGV == 8 + ARGV[8] and ARGV[4] == '' and ARGV[5] == '0' and ARGV[6] == '0' then
  local names = call('SMEMBERS', prefix .. 'topic:' .. ARGV[3])
  if #names == 1 then
    local settings = call('HMGET', prefix .. 'settings:' .. names[1], 'ordered', 'max')
    if settings[1] == '0' and settings[2] == '' then
      if not again then
        call('XADD', prefix .. 'queue:' .. names[1], '*', unpack(ARGV, 9))
        note(mine, before, ARGV[2])
      end
      return {{}, {}}
    end
  end
end

-- The rest of queue.lua that is needed:
local nowhere, missing, position, i = {}, {}, 0, 3
while i <= #ARGV do
  local topic, target, reached = ARGV[i], ARGV[i + 1], true
  if target ~= '' and not queue_of(target) then
    missing[#missing + 1] = position
    i = i + 6 + ARGV[i + 5]
  elseif again then
    reached = target ~= '' or call('EXISTS', prefix .. 'topic:' .. topic) == 1
    i = i + 6 + ARGV[i + 5]
  else
    i, reached = publish(i)
  end
  if not reached then nowhere[#nowhere + 1] = position end
  position = position + 1
end
if not again then
  keep_bounds()
  note(mine, before, ARGV[2])
end
return {nowhere, missing}
