//go:build !unix

package main

import (
	"errors"
	"os"
)

// pollable is not to be had: pipes have no deadlines here.
func pollable(*os.File) (*os.File, error) {
	return nil, errors.New("pipes have no deadlines on this system")
}

func outliveStderr() {}
