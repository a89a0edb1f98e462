package rpc

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// TCPConnecter connects over TCP, without encryption: the server knows its clients by their addresses, and whoever is
// on the way can read and change what passes. For networks that are trusted, or that encrypt by themselves.
//
// The fields must not be changed once it is in use; Connect is safe for concurrent use.
type TCPConnecter struct {
	Addr   string     // host:port of the server; the host is a name or an address, the port a number or a service's name
	Dialer net.Dialer // how to dial: time limits, local address, keep-alive; the zero value is fine
}

// Connect dials Addr. The caller closes the connection. Errors are those of package net, which name Addr; ctx ends the
// dialing, not the connection.
func (c *TCPConnecter) Connect(ctx context.Context) (net.Conn, error) {
	return dialTCP(ctx, &c.Dialer, c.Addr)
}

func dialTCP(ctx context.Context, dialer *net.Dialer, addr string) (net.Conn, error) {
	if addr == "" {
		return nil, errors.New("rpc: connect: no address: the connecter's Addr is empty, want host:port")
	}
	return dialer.DialContext(ctx, "tcp", addr) // whose errors name addr
}

// listenTCP binds addr, for both kinds of listener.
func listenTCP(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, &lostError{"listen on " + printable(addr), err}
	}
	return l, nil
}

// ListenTCP listens on addr (host:port; without a host on every address, with port 0 on one that is free) for clients
// that are known by their addresses. The map gives the identity of each:
//
//	"10.1.2.3": "db7"                an address
//	"fe80::1%eth0": "db8"            an address on one link; it goes before "fe80::1", which is that address on any link
//	"10.0.0.0/24": "lan-*"           a prefix; * becomes the client's address, here lan-10.0.0.7
//	"2001:db8::/32": "branch"        one identity for all of them
//
// Of several that match, the longest prefix wins, and an address alone is the longest. IPv4 addresses in IPv6 form
// (::ffff:10.1.2.3) are taken as IPv4, in the map and in clients. If the address that replaces a * has a zone, its %
// becomes a -, as in lan-fe80::1-eth0: the same address on two links is two clients. Where the zone's name has
// letters that no identity may have, the client is refused. Other clients are refused with PermissionDenied.
//
// All entries are checked at once. It is an error if there are none, if one is no address or prefix, if an identity
// is not valid for each address of its entry (see [Listener]), if it has a * beside a single address, or if one
// prefix is there twice in different spellings. Errors name the entries, or addr where listening fails. The caller
// closes the Listener, or hands it to a Server, and may change the map afterwards; Authenticate is safe for
// concurrent use.
func ListenTCP(addr string, clients map[string]string) (*Listener, error) {
	known, err := parseClients(clients)
	if err != nil {
		return nil, err
	}
	l, err := listenTCP(addr)
	if err != nil {
		return nil, err
	}
	authenticate := func(_ context.Context, conn net.Conn) (net.Conn, string, error) {
		identity, err := known.identify(conn.RemoteAddr())
		return conn, identity, err
	}
	return &Listener{Listener: l, Authenticate: authenticate}, nil
}

// clientEntry is an entry of ListenTCP's map.
type clientEntry struct {
	prefix   netip.Prefix // masked; for an address of all its bits; never IPv4 in IPv6 form, never with a zone
	zone     string       // "" for any; with one, the prefix is an address
	identity string       // with * for the address
}

// clientEntries are in no order: they are few, and sorting them would be most of the code here.
type clientEntries []clientEntry

func parseClients(clients map[string]string) (clientEntries, error) {
	if len(clients) == 0 {
		return nil, errors.New("rpc: listen: no clients are listed, so that none could connect")
	}
	entries := make(clientEntries, 0, len(clients))
	spelled := make(map[string]string, len(clients)) // the keys, by what they mean
	wrong := ""                                      // the least of the errors, so that the same map gives the same one
	for text, identity := range clients {
		entry, reason := parseClient(text, identity)
		meaning := entry.prefix.String() + "%" + entry.zone
		if other := spelled[meaning]; reason == "" && other != "" {
			first, second := min(text, other), max(text, other)
			reason = "s " + quoted(first) + " and " + quoted(second) + " are the same prefix"
			text = first
		}
		if reason != "" && (wrong == "" || reason < wrong) {
			wrong = reason
		}
		spelled[meaning] = text
		entries = append(entries, entry)
	}
	if wrong != "" {
		return nil, errors.New("rpc: client" + wrong)
	}
	return entries, nil
}

// parseClient returns what is wrong with an entry as the rest of an error, "" if nothing is.
func parseClient(text, identity string) (e clientEntry, wrong string) {
	prefix, zone, err := parseClientPrefix(text)
	if err != nil {
		return e, " " + quoted(text) + ": " + err.Error()
	}
	sample := identity
	if strings.Contains(text, "/") {
		sample = fillIn(identity, "*", longestAddr(prefix))
	}
	if !validIdentity(sample) {
		wrong = " " + quoted(text) + ": " + quoted(identity) + " is not a valid identity"
	}
	return clientEntry{prefix, zone, identity}, wrong
}

// fillIn puts something in the place of each mark in s.
func fillIn(s, mark, with string) string {
	before, after, found := strings.Cut(s, mark)
	if !found {
		return s
	}
	return before + with + fillIn(after, mark, with)
}

// parseClientPrefix reads a key of the map: an address, an address with a zone, or a prefix.
func parseClientPrefix(text string) (prefix netip.Prefix, zone string, err error) {
	if strings.Contains(text, "/") {
		if prefix, err = netip.ParsePrefix(text); err != nil {
			return prefix, "", err
		}
		prefix, err = unmapPrefix(prefix)
		return prefix.Masked(), "", err
	}
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return prefix, "", err
	}
	addr = addr.Unmap()
	return netip.PrefixFrom(addr.WithZone(""), addr.BitLen()), addr.Zone(), nil
}

// mappedBits is the length of ::ffff:0:0/96, which holds the IPv4 addresses in IPv6 form.
const mappedBits = 96

func unmapPrefix(p netip.Prefix) (netip.Prefix, error) {
	if !p.Addr().Is4In6() {
		return p, nil
	}
	if p.Bits() < mappedBits {
		return p, errors.New("a prefix of IPv4 addresses in IPv6 form has at least " + strconv.Itoa(mappedBits) + " bits")
	}
	return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mappedBits), nil
}

// longestAddr stands for the addresses of a prefix where the identity made from one is checked for its length.
func longestAddr(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "255.255.255.255"
	}
	return "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
}

// identify returns who is at the address. No address at all, as of a pipe, is nobody's.
func (es clientEntries) identify(remote net.Addr) (string, error) {
	addr, text := remoteAddr(remote)
	bare := addr.WithZone("")
	best := clientEntry{}
	for _, e := range es {
		if e.prefix.Contains(bare) && (e.zone == "" || e.zone == addr.Zone()) && e.rank() > best.rank() {
			best = e
		}
	}
	if !best.prefix.IsValid() {
		return "", &Error{PermissionDenied, "client " + quoted(text) + " is not allowed"}
	}
	identity := fillIn(best.identity, "*", fillIn(text, "%", "-")) // only a zone can make it one that is not valid
	if !validIdentity(identity) {
		reason := "client " + quoted(text) + " is not allowed: its address makes no valid identity"
		return "", &Error{PermissionDenied, reason}
	}
	return identity, nil
}

// rank is higher for what goes before: a longer prefix, and an address with a zone before that without. An entry that
// is none has the lowest.
func (e *clientEntry) rank() int {
	if e.zone != "" {
		return e.prefix.Bits() + 1
	}
	return e.prefix.Bits()
}

// remoteAddr is the address without its port, and how to write it. Of what is none, the address is not valid and in
// no prefix.
func remoteAddr(remote net.Addr) (addr netip.Addr, text string) {
	if remote == nil {
		return addr, ""
	}
	text = remote.String()
	host, _, err := net.SplitHostPort(text)
	if err != nil {
		host = text
	}
	if addr, err = netip.ParseAddr(host); err != nil {
		return addr, text
	}
	addr = addr.Unmap()
	return addr, addr.String()
}
