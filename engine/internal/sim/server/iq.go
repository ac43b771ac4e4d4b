package server

import (
	"strings"
	"time"

	"go.mau.fi/whatsmeow/types"
)

// iqError is an answer of type error.
type iqError struct {
	code int
	text string
}

var (
	errItemNotFound  = &iqError{404, "item-not-found"}
	errNotAuthorized = &iqError{401, "not-authorized"}
	errBadRequest    = &iqError{400, "bad-request"}
)

// iqHandler answers a query with the content of its result.
type iqHandler func(c *client, device *Device, iq, child *Node) ([]Node, *iqError)

// iqHandlers by namespace and first child. Everything else gets an empty result, which clients accept for
// passive/active, pings, statistics, privacy tokens and settings, status, dirty bits and more.
var iqHandlers = map[string]iqHandler{
	"encrypt count":              countKeys,
	"encrypt registration":       uploadKeys,
	"encrypt digest":             digestKeys,
	"encrypt key":                fetchKeys,
	"encrypt rotate":             rotateKey,
	"usync usync":                usync,
	"w:sync:app:state sync":      appState,
	"blocklist":                  blocklist,
	"privacy privacy":            privacySettings,
	"abt props":                  abProps,
	"md remove-companion-device": removeCompanion,
	"w:g2 participating":         ownGroups,
	"w:g2 query":                 describeGroup,
	"w:g2 create":                createGroup,
}

// handleIQ answers a query; an unanswered one costs a client its timeout (75 s in whatsmeow).
func (c *client) handleIQ(iq *Node) {
	kind := AttrString(iq, "type")
	if kind == "result" || kind == "error" {
		// The client's own answers are never answered. The one to pair-success completes the pairing.
		if claim := c.claim.Load(); claim != nil && AttrString(iq, "id") == claim.iqID {
			c.completePairing(claim, iq)
		}
		return
	}
	content, failure, after := c.dispatchIQ(iq)
	answer := Node{Tag: "iq", Attrs: Attrs{"id": AttrString(iq, "id"), "type": "result", "from": types.ServerJID}}
	if to := AttrJID(iq, "to"); !to.IsEmpty() {
		answer.Attrs["from"] = to
	}
	if failure != nil {
		answer.Attrs["type"] = "error"
		content = []Node{{Tag: "error", Attrs: Attrs{"code": failure.code, "text": failure.text}}}
	}
	if content != nil {
		answer.Content = content
	}
	c.answer(answer)
	if after != nil {
		after()
	}
}

// dispatchIQ finds the handler. After is what must follow the answer: a logout cuts the connection it came on.
func (c *client) dispatchIQ(iq *Node) (content []Node, failure *iqError, after func()) {
	namespace := AttrString(iq, "xmlns")
	var child Node
	if children := iq.GetChildren(); len(children) > 0 {
		child = children[0]
	}
	if failure := c.queryFault(c.device(), namespace, &child); failure != nil {
		return nil, failure, nil
	}
	if namespace == "md" && child.Tag == "link_code_companion_reg" {
		content, failure = c.linkCode(&child)
		return content, failure, nil
	}
	handler := iqHandlers[strings.TrimSpace(namespace+" "+child.Tag)]
	if handler == nil {
		return nil, nil, nil
	}
	device := c.device()
	if device == nil {
		return nil, errNotAuthorized, nil
	}
	content, failure = handler(c, device, iq, &child)
	if namespace == "md" && failure == nil {
		after = func() { c.srv.logout(device, AttrJID(&child, "jid").Device) }
	}
	return content, failure, after
}

// logout removes the device that asks for it, or another of its account.
func (s *Server) logout(asker *Device, id uint16) {
	goodbye := (*client).goodbye
	if id == asker.ID {
		goodbye = (*client).goodbyeAfterLogout
	}
	if target := asker.Account.Device(id); target != nil {
		s.unlink(target, goodbye)
	}
}

func countKeys(_ *client, device *Device, _, _ *Node) ([]Node, *iqError) {
	return []Node{{Tag: "count", Attrs: Attrs{"value": device.keys.count()}}}, nil
}

func uploadKeys(_ *client, device *Device, iq, _ *Node) ([]Node, *iqError) {
	registration, keys, err := parseUpload(iq)
	if err != nil {
		return nil, errBadRequest
	}
	device.keys.register(registration)
	device.keys.upload(keys)
	return nil, nil
}

// digestKeys says "the server's keys are yours": without `<digest/>` in the answer Baileys uploads again at each login.
func digestKeys(*client, *Device, *Node, *Node) ([]Node, *iqError) {
	return []Node{{Tag: "digest"}}, nil
}

func rotateKey(_ *client, device *Device, _, rotate *Node) ([]Node, *iqError) {
	signed, err := parseSigned(rotate.GetChildByTag("skey"))
	if err != nil {
		return nil, errBadRequest
	}
	device.keys.rotate(signed)
	return nil, nil
}

// fetchKeys uses up one one-time key of every device that is asked for.
func fetchKeys(c *client, device *Device, _, query *Node) ([]Node, *iqError) {
	var users []Node
	missing := c.withoutKeys(device)
	for _, user := range query.GetChildrenByTag("user") {
		jid := AttrJID(&user, "jid")
		if missing(c.srv.Account(jid)) {
			continue
		}
		answer := Node{Tag: "user", Attrs: Attrs{"jid": jid}}
		if target := c.srv.device(jid); target != nil {
			bundle := c.srv.TakeBundle(target)
			answer.Content = append([]Node{bundle.RegistrationNode()}, bundle.Nodes()...)
		} else {
			answer.Content = []Node{{Tag: "error", Attrs: Attrs{"code": errItemNotFound.code, "text": errItemNotFound.text}}}
		}
		users = append(users, answer)
	}
	return []Node{{Tag: "list", Content: users}}, nil
}

// appState answers for every collection that is asked for; a client asks again, for ever, for one without an answer.
func appState(_ *client, _ *Device, _, sync *Node) ([]Node, *iqError) {
	var collections []Node
	for _, asked := range sync.GetChildrenByTag("collection") {
		collections = append(collections, Node{Tag: "collection", Attrs: Attrs{
			"name": AttrString(&asked, "name"), "version": 0, "has_more_patches": false,
		}})
	}
	return []Node{{Tag: "sync", Content: collections}}, nil
}

func blocklist(*client, *Device, *Node, *Node) ([]Node, *iqError) {
	return []Node{{Tag: "list"}}, nil
}

// privacySettings lets everybody see everything: with readreceipts=all a client sends real read receipts.
func privacySettings(*client, *Device, *Node, *Node) ([]Node, *iqError) {
	var categories []Node
	for _, name := range []string{"readreceipts", "last", "online", "profile", "status", "groupadd", "calladd"} {
		categories = append(categories, Node{Tag: "category", Attrs: Attrs{"name": name, "value": "all"}})
	}
	return []Node{{Tag: "privacy", Content: categories}}, nil
}

func abProps(*client, *Device, *Node, *Node) ([]Node, *iqError) {
	return []Node{{Tag: "props", Attrs: Attrs{"protocol": 1}}}, nil
}

// removeCompanion is the client's logout; dispatchIQ removes the device once the answer is on its way.
func removeCompanion(_ *client, device *Device, _, remove *Node) ([]Node, *iqError) {
	target := AttrJID(remove, "jid")
	if target.Device == 0 || device.Account.Device(target.Device) == nil || target.User != device.Address(target.Server == types.HiddenUserServer).User {
		return nil, errItemNotFound
	}
	return nil, nil
}

// usync answers questions about users: devices, LIDs, whether a number has an account.
func usync(c *client, device *Device, _, query *Node) ([]Node, *iqError) {
	protocols := query.GetChildByTag("query")
	list := query.GetChildByTag("list")
	users := []Node{}
	for _, user := range list.GetChildrenByTag("user") {
		users = append(users, c.srv.describe(device, &user, protocols.GetChildren()))
	}
	return []Node{{Tag: "usync", Attrs: query.Attrs, Content: []Node{{Tag: "list", Content: users}}}}, nil
}

// describe answers for one user. The answer carries the address that was asked for, or, for a `<contact>` query by
// number, the one it leads to.
func (s *Server) describe(asker *Device, user *Node, protocols []Node) Node {
	jid := AttrJID(user, "jid")
	contact := contactNumber(user)
	if jid.IsEmpty() {
		jid = types.NewJID(contact, types.DefaultUserServer)
	}
	account := s.Account(jid)
	answer := Node{Tag: "user", Attrs: Attrs{"jid": jid}}
	var content []Node
	for _, protocol := range protocols {
		switch protocol.Tag {
		case "devices":
			content = append(content, s.describeDevices(asker, account, jid.Server == types.HiddenUserServer))
		case "lid":
			if account != nil {
				content = append(content, Node{Tag: "lid", Attrs: Attrs{"val": account.LIDJID()}})
			}
		case "contact":
			content = append(content, describeContact(user, account))
			if account != nil && AttrString(&protocol, "addressing_mode") == "lid" {
				answer.Attrs["jid"], answer.Attrs["pn_jid"] = account.LIDJID(), account.JID()
			}
		}
	}
	answer.Content = content
	return answer
}

// contactNumber is the number of a `<contact>` query: whatsmeow writes `15550002@c.us`, Baileys `+15550002`.
func contactNumber(user *Node) string {
	text := childText(user, "contact")
	return strings.TrimPrefix(strings.TrimSuffix(text, "@"+types.LegacyUserServer), "+")
}

func describeContact(user *Node, account *Account) Node {
	kind := "out"
	if account != nil {
		kind = "in"
	}
	node := Node{Tag: "contact", Attrs: Attrs{"type": kind}}
	if text := childText(user, "contact"); text != "" {
		node.Content = []byte(text)
	}
	return node
}

// describeDevices lists an account's devices; key-index is required for every linked one.
func (s *Server) describeDevices(asker *Device, account *Account, lidMode bool) Node {
	devices := []Node{}
	if account != nil {
		for _, d := range account.watch(asker, lidMode) {
			attrs := Attrs{"id": int(d.ID)}
			if d.ID != 0 {
				attrs["key-index"] = d.KeyIndex
			}
			devices = append(devices, Node{Tag: "device", Attrs: attrs})
		}
	}
	return Node{Tag: "devices", Content: []Node{
		{Tag: "device-list", Attrs: Attrs{"hash": "sim", "t": time.Now().Unix()}, Content: devices},
	}}
}
