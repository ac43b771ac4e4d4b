// SPDX-License-Identifier: GPL-3.0-or-later

package endpoint

import (
	"errors"
	"net"
	"net/netip"
	"net/url"
)

// proxyPorts are the schemes of proxies with their usual ports.
var proxyPorts = map[string]string{"http": "80", "https": "443", "socks5": "1080"}

// ParseProxy reads a session's proxy; nil when text is empty. No error repeats the text: it may hold a password.
func (e *Endpoint) ParseProxy(text string) (*url.URL, error) {
	if text == "" {
		return nil, nil
	}
	proxy, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("proxy is not a URL")
	}
	port, known := proxyPorts[proxy.Scheme]
	switch {
	case !known:
		return nil, errors.New("proxy must be an http, https or socks5 URL")
	case proxy.Hostname() == "" || proxy.Opaque != "":
		return nil, errors.New("proxy names no host")
	case proxy.Path != "" && proxy.Path != "/" || proxy.RawQuery != "" || proxy.Fragment != "":
		return nil, errors.New("proxy has more than a host, a port, a user and a password")
	}
	if proxy.Port() != "" {
		port = proxy.Port()
	}
	if ip, err := netip.ParseAddr(proxy.Hostname()); e.Foreign() && (err != nil || !ip.IsLoopback()) {
		return nil, errors.New("with --endpoint a proxy must be at a loopback address")
	}
	return &url.URL{Scheme: proxy.Scheme, User: proxy.User, Host: net.JoinHostPort(proxy.Hostname(), port)}, nil
}
