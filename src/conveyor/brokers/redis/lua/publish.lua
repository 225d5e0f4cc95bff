-- Publish a batch. ARGV: sender, number of this batch, then the messages (see publish() in queue.lua).
-- Gives the positions of those whose topic no queue has, and of those whose queue is not there.
-- A batch that comes again, because its answer was lost, does nothing.
local mine = prefix .. 'sent:' .. ARGV[1] .. ':publish'
local again = tonumber(call('GET', mine) or 0) >= tonumber(ARGV[2])
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
  call('SET', mine, ARGV[2], 'EX', 3600)
end
return {nowhere, missing}
