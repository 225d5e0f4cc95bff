-- A sign of life. ARGV: owner, milliseconds until it is taken for dead, sender. Gives 1 where it was not alive before.
begin()
local born = call('SET', prefix .. 'owner:' .. ARGV[1], '1', 'PX', ARGV[2], 'GET')
for _, kind in ipairs({':publish', ':settle'}) do call('GETEX', prefix .. 'sent:' .. ARGV[3] .. kind, 'EX', remembered) end
sweep()
return born and 0 or 1
