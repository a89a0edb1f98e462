package rpc

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
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
	text     string       // the key as it was written, for errors
	prefix   netip.Prefix // masked; for an address of all its bits; never IPv4 in IPv6 form, never with a zone
	zone     string       // "" for any
	identity string       // with * for the address
}

// clientEntries are in order of precedence: the first that matches wins.
type clientEntries []clientEntry

func parseClients(clients map[string]string) (clientEntries, error) {
	if len(clients) == 0 {
		return nil, errors.New("rpc: listen: no clients are listed, so that none could connect")
	}
	entries := make(clientEntries, 0, len(clients))
	for _, text := range slices.Sorted(maps.Keys(clients)) { // sorted, so that the same map gives the same error
		entry, err := parseClient(text, clients[text])
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry)
	}
	slices.SortFunc(entries, clientEntry.compare)
	for i := 1; i < len(entries); i++ {
		if a, b := entries[i-1], entries[i]; a.prefix == b.prefix && a.zone == b.zone {
			return nil, errors.New("rpc: clients " + quoted(a.text) + " and " + quoted(b.text) + " are the same prefix")
		}
	}
	return entries, nil
}

// compare puts addresses with a zone first, then longer prefixes before shorter ones, and the spellings of one
// prefix side by side.
func (e clientEntry) compare(other clientEntry) int {
	if (e.zone == "") != (other.zone == "") {
		return strings.Compare(other.zone, e.zone)
	}
	if d := other.prefix.Bits() - e.prefix.Bits(); d != 0 {
		return d
	}
	if d := e.prefix.Addr().Compare(other.prefix.Addr()); d != 0 {
		return d
	}
	if d := strings.Compare(e.zone, other.zone); d != 0 {
		return d
	}
	return strings.Compare(e.text, other.text)
}

func parseClient(text, identity string) (clientEntry, error) {
	prefix, zone, err := parseClientPrefix(text)
	if err != nil {
		return clientEntry{}, errors.New("rpc: client " + quoted(text) + ": " + err.Error())
	}
	sample := identity
	if strings.Contains(text, "/") {
		sample = strings.ReplaceAll(identity, "*", longestAddr(prefix))
	}
	if !validIdentity(sample) {
		wrong := quoted(identity) + " is not a valid identity"
		return clientEntry{}, errors.New("rpc: client " + quoted(text) + ": " + wrong)
	}
	return clientEntry{text, prefix, zone, identity}, nil
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
	for _, e := range es {
		if e.prefix.Contains(bare) && (e.zone == "" || e.zone == addr.Zone()) {
			return e.name(text)
		}
	}
	return "", &Error{PermissionDenied, "client " + quoted(text) + " is not allowed"}
}

// name is the identity of a client at the address. Only a zone can make it one that is not valid.
func (e clientEntry) name(addr string) (string, error) {
	identity := strings.ReplaceAll(e.identity, "*", strings.ReplaceAll(addr, "%", "-"))
	if !validIdentity(identity) {
		reason := "client " + quoted(addr) + " is not allowed: its address makes no valid identity"
		return "", &Error{PermissionDenied, reason}
	}
	return identity, nil
}

// remoteAddr is the address without its port, and how to write it. Of what is none, the address is not valid and in
// no prefix.
func remoteAddr(remote net.Addr) (addr netip.Addr, text string) {
	if remote == nil {
		return addr, ""
	}
	text = remote.String()
	addr, err := netip.ParseAddr(text)
	if addrPort, portErr := netip.ParseAddrPort(text); portErr == nil {
		addr, err = addrPort.Addr(), nil
	}
	if err != nil {
		return netip.Addr{}, text
	}
	addr = addr.Unmap()
	return addr, addr.String()
}
