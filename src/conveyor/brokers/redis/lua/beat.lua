-- A sign of life. ARGV: owner, epoch of its connection, milliseconds until it is taken for dead.
local owner, life = prefix .. 'owner:' .. ARGV[1], ARGV[3]
local kick = prefix .. 'kick:' .. ARGV[1]
call('HSET', owner, 'epoch', ARGV[2])
call('PEXPIRE', owner, life)
if call('EXISTS', kick) == 0 then call('XGROUP', 'CREATE', kick, 'bell', '$', 'MKSTREAM') end
call('PEXPIRE', kick, life)
sweep()
return 1
