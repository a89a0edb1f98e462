//go:build unix

package main

import (
	"os/exec"
	"syscall"
)

// apart keeps a terminal's interrupt from the child: this process decides what still comes to its end.
func apart(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
