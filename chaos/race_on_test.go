//go:build race && !rpc_notls

package chaos_test

// raceEnabled: the race detector makes everything slower by far.
const raceEnabled = true
