-- An owner is gone: what it declared for itself vanishes. ARGV: owner.
local held = call('HGETALL', prefix .. 'temporary')
for i = 1, #held, 2 do
  if held[i + 1] == ARGV[1] then remove(held[i]) end
end
call('DEL', prefix .. 'owner:' .. ARGV[1])
return 1
