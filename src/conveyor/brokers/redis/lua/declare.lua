-- Declare queues. ARGV: owner, then for each: name, ordered, max ('' is none), lease, temporary, topics as JSON.
-- All are checked before one is made. Gives nothing, or what is in conflict: name, ordered and temporary as they are, holder.
local owner = ARGV[1]
for i = 2, #ARGV, 6 do
  local queue = queue_of(ARGV[i])
  if queue then
    local temporary = queue.holder ~= '' and '1' or '0'
    local ordered = queue.ordered and '1' or '0'
    if ordered ~= ARGV[i + 1] or temporary ~= ARGV[i + 4] or (temporary == '1' and queue.holder ~= owner) then
      return {i, ordered, temporary, queue.holder}
    end
  end
end
begin()
for i = 2, #ARGV, 6 do
  local name, settings = ARGV[i], prefix .. 'settings:' .. ARGV[i]
  local temporary = ARGV[i + 4] == '1'
  local topics = cjson.decode(call('HGET', settings, 'topics') or '[]')
  local has = {}
  for _, topic in ipairs(topics) do has[topic] = true end
  for _, topic in ipairs(cjson.decode(ARGV[i + 5])) do
    if not has[topic] then
      has[topic] = true
      topics[#topics + 1] = topic
      call('SADD', prefix .. 'topic:' .. topic, name)
    end
  end
  call('HSET', settings, 'ordered', ARGV[i + 1], 'max', ARGV[i + 2], 'lease', ARGV[i + 3],
    'holder', temporary and owner or '', 'topics', #topics > 0 and cjson.encode(topics) or '[]')
  call('SADD', KEYS[1], name)
  -- Of a queue that was there, too: somebody may have deleted its stream, and the groups with it. A group that is there is an error, and stays.
  redis.pcall('XGROUP', 'CREATE', prefix .. 'queue:' .. name, 'conveyor', '0', 'MKSTREAM')
  redis.pcall('XGROUP', 'CREATE', prefix .. 'queue:' .. name, 'bell', '0')
  redis.pcall('XGROUP', 'CREATE', prefix .. 'bell:' .. name, 'bell', '0', 'MKSTREAM')
  if temporary then call('HSET', prefix .. 'temporary', name, owner) end
  known[name] = nil
  drop(queue_of(name))
end
return {}
