package server

import (
	"context"
	"strconv"
	"time"

	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// Reasons of `<failure>` (whatsmeow types/events, ConnectFailureReason).
const (
	failureLoggedOut  = 401
	failureBadRequest = 400
	failureTempBanned = 402
	// tempBanTooManyMessages is one of the reasons of a temporary ban (whatsmeow types/events, TempBanReason).
	tempBanTooManyMessages = 101
)

// start deals with the payload of the handshake: a login, or a client that wants to be paired.
func (c *client) start(ctx context.Context) error {
	var payload waWa6.ClientPayload
	if err := proto.Unmarshal(c.link.Payload(), &payload); err != nil {
		c.fail(failureBadRequest)
		return nil
	}
	c.identify(&payload)
	who := c.who.Load()
	if _, _, closed := c.srv.faults.strike(FaultClose, who, atStage(StageLogin)); closed {
		// whatsmeow never hears of a close that comes before its own end of the handshake; no network is that fast.
		c.grace(ctx)
		return errFaultClose
	}
	if c.frozen() != nil {
		return nil // nobody has heard who this is: the connection never gets further
	}
	if f, _, refused := c.srv.faults.strike(FaultLogin, who, nil); refused {
		c.goodbye(failure(f.Code, f.Expire))
		return nil
	}
	c.admit(&payload)
	return nil
}

// identify notes which device the client says it is, if there is such a device: faults are aimed at it.
func (c *client) identify(payload *waWa6.ClientPayload) {
	if payload.Username == nil || payload.GetDevice() > maxDeviceID {
		return
	}
	jid := types.NewJID(strconv.FormatUint(payload.GetUsername(), 10), types.DefaultUserServer)
	jid.Device = uint16(payload.GetDevice())
	if device := c.srv.device(jid); device != nil {
		c.who.Store(device)
	}
}

func (c *client) admit(payload *waWa6.ClientPayload) {
	switch {
	case payload.Username != nil:
		c.login(strconv.FormatUint(payload.GetUsername(), 10), payload.GetDevice())
	case payload.GetDevicePairingData() != nil:
		c.offerPairing(payload.GetDevicePairingData())
	default:
		c.fail(failureBadRequest)
	}
}

func (c *client) fail(reason int) {
	c.goodbye(failure(reason, 0))
}

// login lets in a linked device that holds the Noise key it was paired with.
func (c *client) login(number string, id uint32) {
	account := c.srv.Account(types.NewJID(number, types.DefaultUserServer))
	if account == nil || id == 0 || id > maxDeviceID {
		c.fail(failureLoggedOut)
		return
	}
	device := account.Device(uint16(id))
	if device == nil || device.noiseKey != c.link.ClientStatic() {
		c.fail(failureLoggedOut)
		return
	}
	replaced, offline, ok := device.attach(c)
	if !ok {
		c.fail(failureLoggedOut)
		return
	}
	if replaced != nil {
		replaced.goodbye(streamError("", Node{Tag: "conflict", Attrs: Attrs{"type": "replaced"}}))
	}
	// The writer takes nothing from the mailbox before attached is set, and sends replies first: success is the first
	// stanza of the connection.
	c.answer(Node{Tag: "success", Attrs: Attrs{
		"t": time.Now().Unix(), "lid": device.Address(true), "location": "sim",
	}})
	c.attached.Store(&attachment{device: device, offline: offline})
	c.nudge()
	c.srv.logins.Add(1)
	c.log.Info("login", "action", "login", "account", number, "device", id, "pending", offline.total)
}
