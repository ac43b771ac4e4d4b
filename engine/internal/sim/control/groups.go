package control

import (
	"errors"
	"net/http"
	"strings"

	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/sim/phone"
	"warren/engine/internal/sim/server"
)

type groupAnswer struct {
	ID           string   `json:"id"`
	Subject      string   `json:"subject"`
	Creator      string   `json:"creator"`
	Participants []string `json:"participants"`
}

func describeGroup(g *server.Group) groupAnswer {
	answer := groupAnswer{ID: g.JID().String(), Subject: g.Subject, Creator: g.Creator.Number}
	for _, member := range g.Members() {
		answer.Participants = append(answer.Participants, member.Number)
	}
	return answer
}

func (a *API) createGroup(r *http.Request) (any, error) {
	var body struct {
		Creator, Subject string
		Participants     []string
	}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	creator, err := a.byNumber(body.Creator, "unknown_phone")
	if err != nil {
		return nil, err
	}
	var others []*server.Account
	for _, number := range body.Participants {
		p, err := a.byNumber(number, "unknown_phone")
		if err != nil {
			return nil, err
		}
		others = append(others, p.Account())
	}
	g, err := a.srv.CreateGroup(creator.Account(), others, body.Subject)
	if errors.Is(err, server.ErrBadSubject) || errors.Is(err, server.ErrNoMembers) {
		return nil, badRequest("%v", err)
	} else if err != nil {
		return nil, err
	}
	return describeGroup(g), nil
}

func (a *API) listGroups(*http.Request) (any, error) {
	list := []groupAnswer{}
	for _, g := range a.srv.Groups(nil) {
		list = append(list, describeGroup(g))
	}
	return map[string]any{"groups": list}, nil
}

// recipient finds whom a phone is to send to: a number or a group.
func (a *API) recipient(p *phone.Phone, to string) (send func(string) (string, error), err error) {
	if !strings.HasSuffix(to, "@"+types.GroupServer) {
		other, err := a.byNumber(to, "unknown_recipient")
		if err != nil {
			return nil, err
		}
		return func(text string) (string, error) { return p.Send(other.Account(), text) }, nil
	}
	jid, err := types.ParseJID(to)
	g := a.srv.Group(jid)
	if err != nil || g == nil {
		return nil, notFound("unknown_recipient", "there is no group %q", to)
	}
	if !g.Has(p.Account()) {
		return nil, &apiError{http.StatusConflict, "not_member", phone.ErrNotMember.Error()}
	}
	return func(text string) (string, error) { return p.SendGroup(g, text) }, nil
}

func (a *API) settings(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	var body struct{ Addressing string }
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Addressing != "lid" && body.Addressing != "pn" {
		return nil, badRequest("addressing: lid or pn")
	}
	p.SendToLIDs(body.Addressing == "lid")
	return empty{}, nil
}
