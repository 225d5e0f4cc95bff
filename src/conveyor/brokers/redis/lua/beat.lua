-- A sign of life. ARGV: owner, milliseconds until it is taken for dead. Gives 1 where it was not alive before.
begin()
local born = call('SET', prefix .. 'owner:' .. ARGV[1], '1', 'PX', ARGV[2], 'GET')
sweep()
return born and 0 or 1
