-- Keep dead letters from elsewhere. ARGV: for each: queue, number of fields, fields. All of their queues are there, or none is kept.
local i = 1
while i <= #ARGV do
  if not queue_of(ARGV[i]) then return redis.error_reply('NOQUEUE ' .. ARGV[i]) end
  i = i + 2 + ARGV[i + 1]
end
i = 1
while i <= #ARGV do
  local last = i + 1 + ARGV[i + 1]
  call('XADD', queue_of(ARGV[i]).dead, '*', unpack(ARGV, i + 2, last))
  i = last + 1
end
return 1
