//go:build !race && !rpc_notls

package chaos_test

const raceEnabled = false
