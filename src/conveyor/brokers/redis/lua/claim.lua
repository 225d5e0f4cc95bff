-- Count and lease up to limit messages. ARGV: queue, limit, number of this claim, owner, 1 for early, 1 for one that has waited.
-- Gives fresh ones as XREADGROUP does, others as {reference, counts, fields, when due where that is to come}, and after how many milliseconds there may be more.
local name, room, early, has_waited = ARGV[1], tonumber(ARGV[2]), ARGV[5] == '1', ARGV[6] == '1'
local token, few = ' ' .. ARGV[3] .. ' ' .. ARGV[4], 16
local woken_by -- what the short way read and did not hand out: take_fresh() must, or it is lost
-- A claim that was long on its way must not take what nobody waits for any more.
-- (To look by deleting also makes the first write one that takes no memory; see begin() in queue.lua.)
if call('DEL', prefix .. 'void:' .. ARGV[4] .. ':' .. ARGV[3]) == 1 then return {{}, {}, -1} end

-- Who has waited was most likely woken by a few fresh messages that want nothing special: it has them before the rest is looked
-- at, or defined.
if has_waited and not call('ZRANGE', prefix .. 'ready:' .. name, 0, 0)[1] then
  local settings = call('HMGET', prefix .. 'settings:' .. name, 'lease', 'ordered')
  local asked = math.min(room, few)
  woken_by = settings[1]
    and call('XREADGROUP', 'GROUP', 'conveyor', 'all', 'COUNT', asked, 'NOACK', 'STREAMS', prefix .. 'queue:' .. name, '>')
  if woken_by and #woken_by[1][2] < asked then
    local ends, leases, plain, ordered = number(now() + settings[1]), {}, true, settings[2] == '1'
    for _, entry in ipairs(woken_by[1][2]) do
      for f = 1, #entry[2], 2 do
        local field = entry[2][f]
        if ways[field] and (ordered or field ~= 'ce_partitionkey') then plain = false end
      end
      leases[#leases + 1] = ends
      leases[#leases + 1] = entry[1] .. 'm0' .. token
    end
    if plain then
      call('ZADD', prefix .. 'leases:' .. name, unpack(leases))
      return {woken_by[1][2], {}, 0}
    end
  end
end

-- The rest of queue.lua that is needed:
local queue = queue_of(name)
if not queue then return redis.error_reply('NOQUEUE ' .. name) end

-- What came back by its lease's end, and what has become due, is ready.
local function look_at_clock()
  for _, lease in ipairs(call('ZRANGEBYSCORE', queue.leases, '-inf', number(now()), 'LIMIT', 0, 1000)) do
    come_back(queue, lease, true, 'its lease ended without a sign of life')
  end
  local due = call('ZRANGEBYSCORE', queue.later, '-inf', number(now()), 'WITHSCORES', 'LIMIT', 0, 1000)
  for i = 1, #due, 2 do
    local deliveries, attempts, _, failure = counts_of(queue, due[i])
    count(queue, due[i], deliveries, attempts, due[i + 1], failure)
    call('ZREM', queue.later, due[i])
    call('ZADD', queue.ready, '-' .. sub(due[i], -1), due[i])
  end
end

-- An answer has about this many bytes at most: a larger one would hold up the server, and everybody else, for its time. So the first
-- few tell how large messages are, and how many more may be asked for, but for no more than four times as many as came.
local most_bytes, bytes, taken = 4194304, 0, 0
local function ask()
  if bytes >= most_bytes then return 0 end
  if taken == 0 then return math.min(room, few) end
  return math.min(room, 4 * taken, math.max(few, math.floor((most_bytes - bytes) * taken / math.max(bytes, 1))))
end
local function took(size)
  bytes, taken, room = bytes + size, taken + 1, room - 1
  if bytes >= most_bytes then room = 0 end
end

local ends, leases, others, entries = number(now() + queue.lease), {}, {}, {}
local function take(refs, dues)
  if #refs == 0 then return end
  local counts = call('HMGET', queue.counts, unpack(refs))
  for i, ref in ipairs(refs) do
    local fields = fields_of(queue, ref)
    if fields then
      local at = dues and dues[i] or 0
      if at == 0 and early and queue.ordered then at = (way_of(fields)) end
      others[#others + 1] = {ref, counts[i] or '', fields, at > now() and number(at) or ''}
      leases[#leases + 1] = ends
      leases[#leases + 1] = ref .. (at > now() and ' ' .. ARGV[3] .. '@' .. number(at) .. ' ' .. ARGV[4] or token)
      local size = 0
      for f = 2, #fields, 2 do size = size + #fields[f] end
      took(size)
    else -- somebody deleted it from its stream; in an ordered queue the others of its key go on
      call('HDEL', queue.counts, ref)
      if queue.ordered then
        local heads = call('HGETALL', queue.heads)
        for k = 1, #heads, 2 do
          if heads[k + 1] == ref then next_of(queue, ref, heads[k]) end
        end
      end
    end
  end
end

local function take_ready()
  local asked = ask()
  local refs = asked > 0 and call('ZRANGE', queue.ready, 0, asked - 1) or {}
  if #refs > 0 then call('ZREM', queue.ready, unpack(refs)) end
  take(refs)
  return #refs == asked
end

local function take_fresh()
  local asked = ask()
  local read = woken_by or call('XREADGROUP', 'GROUP', 'conveyor', 'all', 'COUNT', asked, 'NOACK', 'STREAMS', queue.fresh, '>')
  woken_by = nil
  if not read then return false end
  local found, aside = read[1][2], false
  for i = 1, #found do
    local entry = found[i]
    local fields, plain, size = entry[2], true, 0
    for f = 1, #fields, 2 do
      if ways[fields[f]] then plain = false end
      size = size + #fields[f + 1]
    end
    if not plain then
      local at, priority, key = way_of(fields)
      if at > now() or priority > 0 or (queue.ordered and key) then
        give(queue, reference(entry[1], 'm', priority), at, hash_of(key))
        aside = true
      else
        plain = true
      end
    end
    if plain then
      entries[#entries + 1] = entry
      leases[#leases + 1] = ends
      leases[#leases + 1] = entry[1] .. 'm0' .. token
      took(size)
    end
  end
  return #found == asked or aside
end

-- Also what is not due, and what is behind: a key's oldest is in ready, later or somebody's hands, and comes before.
local function take_early()
  local found, refs, dues = call('ZRANGE', queue.later, 0, ask() - 1, 'WITHSCORES'), {}, {}
  for i = 1, #found, 2 do
    refs[#refs + 1], dues[#dues + 1] = found[i], tonumber(found[i + 1])
  end
  if #refs > 0 then call('ZREM', queue.later, unpack(refs)) end
  take(refs, dues)
  if room <= 0 then return #refs end
  local members = call('ZRANGE', queue.behind, 0, ask() - 1)
  if #members > 0 then
    call('ZREM', queue.behind, unpack(members))
    for i, member in ipairs(members) do members[i] = sub(member, 41) end
    take(members)
  end
  return #refs + #members
end

-- Whoever gives less than was asked of it has no more; but what was put aside may be ready now.
local function take_all()
  repeat
    local more = take_ready()
    if room > 0 then more = take_fresh() or more end
    if room > 0 and early then more = take_early() > 0 or more end
  until room <= 0 or not more
end

-- Who has waited looked at the clock before, and was most likely woken by a fresh message: it is given that at once.
if has_waited then
  take_ready()
  if room > 0 and take_fresh() and room > 0 then take_fresh() end
end
if #leases == 0 then
  look_at_clock()
  take_all()
end

if #leases > 0 then
  call('ZADD', queue.leases, unpack(leases))
  if room <= 0 and call('ZCARD', queue.ready) > 0 then ring(queue) end
  return {entries, others, 0}
end
-- Nothing is there: what was rung for is over, and the receiver waits for what comes from now on.
call('XGROUP', 'SETID', queue.fresh, 'bell', '$')
call('XGROUP', 'SETID', queue.bell, 'bell', '$')
local soonest = -1
for _, key in ipairs({queue.later, queue.leases}) do
  local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if first[1] then
    local left = math.max(1, first[2] - now())
    if soonest < 0 or left < soonest then soonest = left end
  end
end
return {entries, others, soonest}
