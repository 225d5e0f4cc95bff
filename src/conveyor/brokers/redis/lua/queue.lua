-- The keys of a queue, and the ways of a message through it. A script begins with those of these definitions that it uses; each
-- uses only what is above it.
--
-- KEYS[1] is "{namespace}:queues". All other keys have the same hash tag, so a cluster has them in one place.
--
-- A message lies in one of two streams until it is done. In queue:<name>, where any program may write, it is *fresh*: the group
-- "conveyor" says up to where fresh ones were handed out. In kept:<name>, or once it was handed out, it is known by its *reference*:
-- its id, with zeros so that text sorts by age, then m or k for the stream, then its priority. A reference is in exactly one of
-- ready, later, behind (an ordered queue's, an older one of the key comes first) or, with the token of its receiver, leases.
local call, sub, find, match = redis.call, string.sub, string.find, string.match
local prefix = sub(KEYS[1], 1, -7)

local moment_of_this
local function now()
  if not moment_of_this then
    local said = call('TIME')
    moment_of_this = said[1] * 1000 + math.floor(said[2] / 1000)
  end
  return moment_of_this
end

-- Where no memory is left, the server refuses a script whose first write takes some. What works on and ends what was accepted before
-- begins with this write, which takes none: else a full server could never be emptied.
local function begin()
  call('DEL', prefix .. 'nothing')
end

-- The number of a sender's last batch is kept for so long, in seconds, behind the sender's last sign of life.
local remembered = 3600

-- Notes the number of a batch, and its answer, in place of what was there before: behind all that may fail, for what is noted is done.
local function note(mine, before, said)
  if before then call('SET', mine, said, 'KEEPTTL') else call('SET', mine, said, 'EX', remembered) end
end

local known = {}
local function queue_of(name)
  local queue = known[name]
  if queue ~= nil then return queue end
  local said = call('HMGET', prefix .. 'settings:' .. name, 'ordered', 'max', 'lease', 'holder')
  if not said[1] then
    known[name] = false
    return false
  end
  queue = {
    name = name, ordered = said[1] == '1', max = tonumber(said[2]), lease = tonumber(said[3]), holder = said[4], rung = 0,
    fresh = prefix .. 'queue:' .. name, kept = prefix .. 'kept:' .. name, ready = prefix .. 'ready:' .. name,
    later = prefix .. 'later:' .. name, behind = prefix .. 'behind:' .. name, heads = prefix .. 'heads:' .. name,
    leases = prefix .. 'leases:' .. name, counts = prefix .. 'counts:' .. name, bell = prefix .. 'bell:' .. name,
    dead = prefix .. 'dead:' .. name,
  }
  known[name] = queue
  return queue
end

local function number(value)
  return string.format('%.0f', value)
end

local function reference(id, stream, priority)
  local ms, seq = match(id, '^(%d+)-(%d+)')
  return string.rep('0', 13 - #ms) .. ms .. '-' .. string.rep('0', 6 - #seq) .. seq .. stream .. priority
end

-- A lease of a fresh message has its id as it came; everywhere else the reference is in full.
local function reference_of(lease)
  local ref = sub(lease, 1, find(lease, ' ', 1, true) - 1)
  if sub(ref, 14, 14) == '-' and sub(ref, 21, 21) == sub(ref, -2, -2) then return ref end
  return reference(ref, sub(ref, -2, -2), sub(ref, -1))
end

local function stream_of(queue, ref)
  return sub(ref, -2, -2) == 'm' and queue.fresh or queue.kept
end

local function fields_of(queue, ref)
  local id = sub(ref, 1, -3)
  local found = call('XRANGE', stream_of(queue, ref), id, id)[1]
  return found and found[2]
end

local function delete(queue, ref)
  call('XDEL', stream_of(queue, ref), sub(ref, 1, -3))
  call('HDEL', queue.counts, ref)
end

-- RFC 3339 as milliseconds since 1970; nil where it is none, or no moment of the calendar.
local function moment(text)
  local y, mo, d, h, mi, s, rest = match(text, '^(%d%d%d%d)-(%d%d)-(%d%d)[Tt ](%d%d):(%d%d):(%d%d)(.*)$')
  if not y then return nil end
  y, mo, d, h, mi, s = tonumber(y), tonumber(mo), tonumber(d), tonumber(h), tonumber(mi), tonumber(s)
  local leap = y % 4 == 0 and (y % 100 ~= 0 or y % 400 == 0)
  local last = mo == 2 and (leap and 29 or 28) or (mo == 4 or mo == 6 or mo == 9 or mo == 11) and 30 or 31
  if y < 1 or mo < 1 or mo > 12 or d < 1 or d > last or h > 23 or mi > 59 or s > 59 then return nil end
  local fraction, zone = match(rest, '^[.,](%d+)(.*)$')
  if not fraction then fraction, zone = '', rest end
  if #zone == 3 then zone = zone .. '00' end -- an offset of hours alone
  local sign, hours, minutes = match(zone, '^([+-])(%d%d):?(%d%d)$')
  local offset = 0
  if sign then
    if tonumber(hours) > 23 or tonumber(minutes) > 59 then return nil end
    offset = (sign == '+' and 1 or -1) * (hours * 3600 + minutes * 60)
  elseif zone ~= '' and zone ~= 'Z' and zone ~= 'z' then
    return nil
  end
  local month = (mo + 9) % 12
  local year = y - (month >= 10 and 1 or 0)
  local days = 365 * year + math.floor(year / 4) - math.floor(year / 100) + math.floor(year / 400)
    + math.floor((month * 153 + 2) / 5) + d - 1 - 719468
  return (days * 86400 + h * 3600 + mi * 60 + s - offset) * 1000 + math.ceil(sub(fraction .. '000000', 1, 6) / 1000)
end

-- What the fields say of the way through the queue: when due, how important, and a hash of the key. Nearly all say nothing.
local ways = {ce_duetime = true, ce_priority = true, ce_partitionkey = true}
local function way_of(fields)
  local due, priority, hash = 0, 0, nil
  for i = 1, #fields, 2 do
    local name = fields[i]
    if ways[name] then
      local value = fields[i + 1]
      if name == 'ce_duetime' then due = moment(value) or 0
      elseif name == 'ce_priority' then priority = match(value, '^%s*[+-]?%d+%s*$') and math.max(0, math.min(9, tonumber(value))) or 0
      else hash = value end
    end
  end
  return due, priority, hash
end

-- Lua hands no more than some 8,000 values to a command. A message of more fields than this goes on as one that holds them all, each name
-- and value behind its length (four bytes); behind it, what it says of its way.
local most_values = 3000
local function packed(fields)
  if #fields <= most_values then return fields end
  local parts, said = {}, {}
  for i = 1, #fields do parts[i] = struct.pack('>I4c0', #fields[i], fields[i]) end
  for i = 1, #fields, 2 do
    if ways[fields[i]] then said[fields[i]] = fields[i + 1] end
  end
  local one = {'conveyor_fields', table.concat(parts)}
  for name, value in pairs(said) do
    one[#one + 1] = name
    one[#one + 1] = value
  end
  return one
end

-- All fields, as they were packed; as they are, where they were not.
local function unpacked(fields)
  if fields[1] ~= 'conveyor_fields' then return fields end
  local all, at, text = {}, 1, fields[2]
  while at <= #text do
    local good, part, behind = pcall(struct.unpack, '>I4c0', text, at)
    if not good then return fields end
    all[#all + 1], at = part, behind
  end
  return #all > 0 and #all % 2 == 0 and all[1] ~= 'conveyor_fields' and all or fields
end

local function hash_of(key)
  return key and redis.sha1hex(key)
end

-- How often it was handed over and counted, how many of those were failed attempts, since when it is ready, and its last error.
local function counts_of(queue, ref)
  local said = call('HGET', queue.counts, ref)
  if not said then return 0, 0, 0, '' end
  local deliveries, attempts, since, failure = match(said, '^(%d+) (%d+) (%d+) (.*)$')
  return tonumber(deliveries), tonumber(attempts), tonumber(since), failure
end

local function count(queue, ref, deliveries, attempts, since, failure)
  call('HSET', queue.counts, ref, deliveries .. ' ' .. attempts .. ' ' .. number(since) .. ' ' .. failure)
end

-- Wakes one waiting receiver: all read from the bell with one group, and the server gives each ring to one of them, and to none
-- that is gone. Fresh messages need no bell: a waiting receiver reads their stream with that group, too.
local function ring(queue)
  if queue.rung < 16 then
    queue.rung = queue.rung + 1
    call('XADD', queue.bell, 'MAXLEN', '16', '*', 'r', '1')
  end
end

local function wait(queue, ref, due)
  if due > now() then
    call('ZADD', queue.later, number(due), ref)
    if call('ZRANGE', queue.later, 0, 0)[1] == ref then ring(queue) end
  else
    call('ZADD', queue.ready, '-' .. sub(ref, -1), ref)
    ring(queue)
  end
end

-- A message comes, or comes back: it waits for its time, or for its turn.
local function give(queue, ref, due, hash)
  if queue.ordered and hash then
    local head = call('HGET', queue.heads, hash)
    if not head then
      call('HSET', queue.heads, hash, ref)
    elseif head ~= ref then
      -- An older one comes back from an early receiver: a younger one that still waits steps behind it.
      if ref < head and call('ZREM', queue.ready, head) + call('ZREM', queue.later, head) > 0 then
        call('HSET', queue.heads, hash, ref)
        ref, head = head, ref
        call('ZADD', queue.behind, 0, hash .. ref)
        wait(queue, head, due)
        return
      end
      call('ZADD', queue.behind, 0, hash .. ref)
      return
    end
  end
  wait(queue, ref, due)
end

-- A message of this key is gone: the next one has its turn.
local function next_of(queue, ref, hash)
  if not (queue.ordered and hash) or call('HGET', queue.heads, hash) ~= ref then return end
  local found = call('ZRANGEBYLEX', queue.behind, '[' .. hash, '(' .. hash .. ':', 'LIMIT', 0, 1)[1]
  if not found then
    call('HDEL', queue.heads, hash)
    return
  end
  call('ZREM', queue.behind, found)
  local after = sub(found, 41)
  call('HSET', queue.heads, hash, after)
  local fields = fields_of(queue, after)
  wait(queue, after, fields and (way_of(fields)) or 0)
end

local function key_hash(queue, ref)
  if not queue.ordered then return nil end
  local fields = fields_of(queue, ref)
  if not fields then return nil end
  local _, _, key = way_of(fields)
  return hash_of(key)
end

-- As key_hash(), of a delivery. Its receiver says the key ('-', or '+' and the key), but may read what others wrote in another way than
-- we (what is no UTF-8, several spellings of one attribute): then the fields decide.
local function hash_of_held(queue, ref, key)
  if not queue.ordered then return nil end
  local hash = sub(key, 1, 1) == '+' and hash_of(sub(key, 2))
  if hash and call('HGET', queue.heads, hash) == ref then return hash end
  return key_hash(queue, ref) or hash or nil
end

-- What an early receiver has is not due before this, in milliseconds; 0 for all others.
local function due_of(lease)
  return tonumber(match(lease, '^%S+ %d+@(%d+) ')) or 0
end

-- A lease ends without its receiver.
local function come_back(queue, lease, counted, why)
  call('ZREM', queue.leases, lease)
  local ref = reference_of(lease)
  if counted then
    local deliveries, attempts = counts_of(queue, ref)
    count(queue, ref, deliveries + 1, attempts, now(), why)
  end
  give(queue, ref, due_of(lease), key_hash(queue, ref))
end

-- Gives back some of what an owner leased (by one claim, or by any), and from where to go on: the server serves others between the parts.
-- A lease is: reference, number of the claim (with @ and when it is due, where it was given early), owner.
local function give_back(queue, owner, claim, from, counted, why)
  local part, back, seen = call('ZSCAN', queue.leases, from, 'COUNT', 1000), {}, {}
  for i = 1, #part[2], 2 do
    local lease = part[2][i]
    local by, whose = match(lease, '^%S+ (%d+)@?%d* (.*)$')
    if whose == owner and (not claim or by == claim) and not seen[lease] then
      seen[lease] = true
      back[#back + 1] = lease
    end
  end
  table.sort(back, function(one, other) return reference_of(one) < reference_of(other) end)
  for _, lease in ipairs(back) do come_back(queue, lease, counted, why) end
  return #back, part[1]
end

-- Keeps a bounded queue within its bound: the oldest of the lowest priority go first.
local function drop(queue)
  if not queue.max then return end
  local excess = call('XLEN', queue.fresh) + call('XLEN', queue.kept) - call('ZCARD', queue.leases) - queue.max
  while excess > 0 do
    local least = call('ZRANGE', queue.ready, -1, -1, 'WITHSCORES')
    local gone = 0
    if not least[1] or tonumber(least[2]) < 0 then
      local read = call('XREADGROUP', 'GROUP', 'conveyor', 'all', 'COUNT', math.min(excess, 1000), 'NOACK', 'STREAMS', queue.fresh, '>')
      if read then
        for _, entry in ipairs(read[1][2]) do call('XDEL', queue.fresh, entry[1]) end
        gone = #read[1][2]
      end
    end
    if gone == 0 then
      local ref
      if least[1] then
        ref = call('ZRANGEBYSCORE', queue.ready, least[2], least[2], 'LIMIT', 0, 1)[1]
        call('ZREM', queue.ready, ref)
      else
        local last = call('ZRANGE', queue.behind, 0, 0)[1]
        if last then
          ref = sub(last, 41)
          call('ZREM', queue.behind, last)
        else
          ref = call('ZRANGE', queue.later, 0, 0)[1]
          if not ref then return end
          call('ZREM', queue.later, ref)
        end
      end
      local hash = key_hash(queue, ref)
      delete(queue, ref)
      next_of(queue, ref, hash)
      gone = 1
    end
    excess = excess - gone
  end
end

-- The id of the oldest fresh message that waits, if any does.
local function oldest_fresh(queue)
  for _, group in ipairs(redis.pcall('XINFO', 'GROUPS', queue.fresh)) do -- an error, which has no parts, where nothing was ever there
    local said = {}
    for i = 1, #group, 2 do said[group[i]] = group[i + 1] end
    if said['name'] == 'conveyor' then
      local oldest = call('XRANGE', queue.fresh, '(' .. said['last-delivered-id'], '+', 'COUNT', 1)[1]
      return oldest and oldest[1]
    end
  end
end

-- What has a key goes behind fresh ones, which may be of its key: nobody has looked at them yet.
local function goes_behind_fresh(queue)
  if queue.waits == nil then queue.waits = oldest_fresh(queue) ~= nil end
  return queue.waits
end

-- Puts a message into one queue; its fields are values[first] to values[last].
local function put(queue, values, first, last, due, priority, hash)
  local in_turn = queue.ordered and hash
  if ((due > 0 and due > now()) or priority > 0 or in_turn) and not (in_turn and goes_behind_fresh(queue)) then
    local id = call('XADD', queue.kept, '*', unpack(values, first, last))
    give(queue, reference(id, 'k', priority), due, hash)
  else
    call('XADD', queue.fresh, '*', unpack(values, first, last))
  end
end

-- One message in ARGV from position i: topic, queue ('' is those of the topic), due, priority, key ('-', or '+' and the key),
-- number of fields, fields. Gives the position behind it, and whether any queue has it.
local of_topic, touched = {}, {}
local function publish(i)
  local topic, target = ARGV[i], ARGV[i + 1]
  local due, priority, key, last = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), ARGV[i + 4], i + 5 + ARGV[i + 5]
  local names
  if target ~= '' then
    names = {target}
  else
    names = of_topic[topic]
    if not names then
      names = call('SMEMBERS', prefix .. 'topic:' .. topic)
      of_topic[topic] = names
    end
  end
  local hash
  for _, name in ipairs(names) do
    local queue = queue_of(name)
    if queue then
      if queue.ordered and not hash and sub(key, 1, 1) == '+' then hash = hash_of(sub(key, 2)) end
      put(queue, ARGV, i + 6, last, due, priority, hash)
      if queue.max then touched[queue] = true end
    end
  end
  return last + 1, #names > 0
end

local function keep_bounds()
  for queue in pairs(touched) do drop(queue) end
end

local function remove(name)
  for _, topic in ipairs(cjson.decode(call('HGET', prefix .. 'settings:' .. name, 'topics') or '[]')) do
    call('SREM', prefix .. 'topic:' .. topic, name)
  end
  for _, kind in ipairs({'queue:', 'kept:', 'ready:', 'later:', 'behind:', 'heads:', 'leases:', 'counts:', 'bell:', 'dead:', 'settings:', 'consumers:'}) do
    call('DEL', prefix .. kind .. name)
  end
  call('SREM', KEYS[1], name)
  call('HDEL', prefix .. 'temporary', name)
  known[name] = false
end

-- How many live subscriptions a queue has; those of the dead are forgotten.
local function consumers_of(name)
  local consumers, there = 0, call('HGETALL', prefix .. 'consumers:' .. name)
  for i = 1, #there, 2 do
    if call('EXISTS', prefix .. 'owner:' .. there[i]) == 1 then
      consumers = consumers + there[i + 1]
    else
      call('HDEL', prefix .. 'consumers:' .. name, there[i])
    end
  end
  return consumers
end

-- Temporary queues whose owner gives no sign of life vanish.
local function sweep()
  local held = call('HGETALL', prefix .. 'temporary')
  for i = 1, #held, 2 do
    if call('EXISTS', prefix .. 'owner:' .. held[i + 1]) == 0 then remove(held[i]) end
  end
end
