-- The figures of every queue: name, topics as JSON, ready, in flight, delayed, dead, age of the oldest in milliseconds or -1, consumers,
-- and its settings: ordered, max or -1, temporary, lease in milliseconds.
sweep()
local all = {}
for _, name in ipairs(call('SMEMBERS', KEYS[1])) do
  local queue = queue_of(name)
  local leased, alive = call('ZCARD', queue.leases), call('ZCOUNT', queue.leases, '(' .. number(now()), '+inf')
  local later, passed = call('ZCARD', queue.later), call('ZCOUNT', queue.later, '-inf', number(now()))
  local behind, ready = call('ZCARD', queue.behind), call('ZCARD', queue.ready)
  local fresh = call('XLEN', queue.fresh) + call('XLEN', queue.kept) - leased - later - behind - ready
  local since = -1
  local function older(moment)
    if since < 0 or moment < since then since = moment end
  end
  for _, ref in ipairs(call('ZRANGE', queue.ready, 0, 99)) do
    local _, _, moment = counts_of(queue, ref)
    older(moment > 0 and moment or tonumber(sub(ref, 1, 13)))
  end
  local first = call('ZRANGE', queue.later, 0, 0, 'WITHSCORES')
  if passed > 0 then older(tonumber(first[2])) end
  if leased > alive then older(tonumber(call('ZRANGE', queue.leases, 0, 0, 'WITHSCORES')[2])) end
  if fresh > 0 then
    local oldest = oldest_fresh(queue)
    if oldest then older(tonumber(match(oldest, '^%d+'))) end
  end
  all[#all + 1] = {
    name, call('HGET', prefix .. 'settings:' .. name, 'topics'), fresh + ready + passed + leased - alive, alive,
    later - passed + behind, call('XLEN', queue.dead), since < 0 and -1 or math.max(0, now() - since), consumers_of(name),
    queue.ordered and 1 or 0, queue.max or -1, queue.holder ~= '' and 1 or 0, queue.lease,
  }
end
return all
