-- A queue goes, with all that is in it. ARGV: queue, 1 where its dead letters may go, too, 1 to look only.
-- Gives its live subscriptions and its dead letters; it is still there where there are any that keep it.
local queue = queue_of(ARGV[1])
if not queue then return redis.error_reply('NOQUEUE ' .. ARGV[1]) end
begin()
local consumers, dead = consumers_of(ARGV[1]), call('XLEN', queue.dead)
if consumers == 0 and (dead == 0 or ARGV[2] == '1') and ARGV[3] ~= '1' then remove(ARGV[1]) end
return {consumers, dead}
