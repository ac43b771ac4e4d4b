// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
	"warren/engine/internal/state"
)

// maxMessageID bounds the id that the daemon chooses; WhatsApp's own have 22 characters.
const maxMessageID = 128

// encryptTries is how often a message is encrypted when its recipient writes at the same moment. From the second time on only a retry that
// whatsmeow answers can be in the way.
const encryptTries = 4

// Sent is the result of a send request.
type Sent struct {
	MessageID string `json:"message_id"`
	Timestamp string `json:"timestamp"`
}

// sendJob is one send request. Whoever answers it first wins: the worker, or the clock.
type sendJob struct {
	request  *frames.Request
	to       types.JID
	deadline time.Time

	once  sync.Once
	timer *time.Timer
	reply func(any, *frames.Error)
}

func (j *sendJob) answer(result any, err *frames.Error) {
	j.once.Do(func() {
		j.timer.Stop()
		j.reply(result, err)
	})
}

// sender sends the messages of a session one after the other, as whatsmeow does anyway.
type sender struct {
	session *Session
	jobs    chan *sendJob

	mu     sync.Mutex
	closed bool
}

func newSender(s *Session) *sender {
	return &sender{session: s, jobs: make(chan *sendJob, sendQueue)}
}

// Send queues a message; reply is called exactly once. It never waits.
func (s *Session) Send(request *frames.Request, reply func(any, *frames.Error)) {
	to, err := parseRecipient(request.To)
	switch {
	case err != nil:
	case request.MessageID == "" || len(request.MessageID) > maxMessageID:
		err = frames.Errorf(frames.CodeBadRequest, "message_id must have 1 to %d characters", maxMessageID)
	case request.Text == "":
		err = frames.Errorf(frames.CodeBadRequest, "the text is empty")
	case !s.online.Load():
		err = notOnline()
	}
	if err != nil {
		reply(nil, err)
		return
	}
	timeout := s.sendTimeout(request)
	job := &sendJob{request: request, to: to, deadline: time.Now().Add(timeout), reply: reply}
	// Started only once the job knows its timer: it may fire at once.
	job.timer = time.AfterFunc(time.Hour, func() {
		job.answer(nil, frames.Errorf(frames.CodeTimeout, "WhatsApp did not answer within %s", timeout))
	})
	job.timer.Reset(timeout)
	if err := s.sends.enqueue(job); err != nil {
		job.answer(nil, err)
	}
}

func (s *Session) sendTimeout(request *frames.Request) time.Duration {
	if request.TimeoutMS <= 0 {
		return s.cfg.Timing.DefaultSend
	}
	return min(time.Duration(min(request.TimeoutMS, 1<<31))*time.Millisecond, s.cfg.Timing.MaximumSend)
}

func notOnline() *frames.Error {
	return frames.Errorf(frames.CodeNotConnected, "the session is not online")
}

func (q *sender) enqueue(job *sendJob) *frames.Error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return notOnline()
	}
	select {
	case q.jobs <- job:
		return nil
	default:
		return frames.Errorf(frames.CodeBusy, "%d sends wait already", sendQueue)
	}
}

func (q *sender) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed {
		q.closed = true
		close(q.jobs)
	}
}

// run works until the queue is closed. After the end of the connection nothing more is sent, and what waits is told so.
func (q *sender) run() {
	for job := range q.jobs {
		switch {
		case q.session.ctx.Err() != nil:
			job.answer(nil, notOnline())
		case time.Now().After(job.deadline):
		default:
			q.serve(job)
		}
	}
}

func (q *sender) serve(job *sendJob) {
	// If whatsmeow panics the request must still get an answer.
	defer job.answer(nil, frames.Errorf(frames.CodeInternal, "the engine failed while it sent: see its log"))
	sent, err := q.session.send(job)
	if err != nil {
		q.session.log.Info("send failed", "code", err.Code, "server_code", err.ServerCode, logs.KeyError, err)
		job.answer(nil, err)
		return
	}
	job.answer(sent, nil)
}

// send runs under the context of the connection and not under the deadline: whatsmeow's socket loses its order when a write is cancelled.
func (s *Session) send(job *sendJob) (*Sent, *frames.Error) {
	to, err := s.resolve(s.ctx, job.to)
	if err != nil {
		return nil, err
	}
	troubles := s.store.Troubles()
	response, failure := s.encryptAndSend(job, func() {})
	for tries := 1; errors.Is(failure, state.ErrSessionChanged) && tries < encryptTries; tries++ {
		response, failure = s.sendUndisturbed(job)
	}
	if failure != nil {
		return nil, s.sendFailed(failure)
	}
	// whatsmeow leaves out devices whose keys it cannot get, and calls a message for our own phone alone a success.
	if !s.wire.reachedAny(s.isRecipient(job.to, to)) && !s.aloneIn(job.to) {
		if s.store.Troubles() != troubles {
			return nil, classifySend(state.ErrDisk)
		}
		return nil, frames.Errorf(frames.CodeRecipientUnreachable, "no device of the recipient has keys to encrypt for")
	}
	return &Sent{MessageID: job.request.MessageID, Timestamp: rfc3339(response.Timestamp)}, nil
}

// sendFailed tells a disk that failed before the message was written, and one that failed after it.
func (s *Session) sendFailed(err error) *frames.Error {
	failure := classifySend(err)
	if failure.Code == frames.CodeDiskTrouble && s.wire.written() {
		return frames.Errorf(frames.CodeDisconnected, "the disk failed after the message was written: %v", err)
	}
	return failure
}

// encryptAndSend sends a message once; onSent is called when it is encrypted and about to be written.
func (s *Session) encryptAndSend(job *sendJob, onSent func()) (whatsmeow.SendResponse, error) {
	s.wire.watch(job.request.MessageID, onSent)
	message := &waE2E.Message{Conversation: proto.String(job.request.Text)}
	return s.cli.SendMessage(s.ctx, job.to, message, whatsmeow.SendRequestExtra{
		ID: job.request.MessageID, Timeout: max(time.Until(job.deadline), time.Millisecond),
	})
}

// sendUndisturbed lets received messages wait while this one is encrypted.
func (s *Session) sendUndisturbed(job *sendJob) (whatsmeow.SendResponse, error) {
	resume, err := s.store.PauseDecryption(s.ctx)
	if err != nil {
		return whatsmeow.SendResponse{}, err
	}
	defer resume()
	return s.encryptAndSend(job, resume)
}

// isRecipient tells the recipient's devices from our own. In a group everybody else is a recipient, and one is enough: the devices that got no key ask
// for the message again, as they do in official clients.
func (s *Session) isRecipient(given, resolved types.JID) func(types.JID) bool {
	if given.Server == types.GroupServer {
		return func(jid types.JID) bool { return !s.isOwn(jid) }
	}
	return func(jid types.JID) bool { return jid.User == given.User || jid.User == resolved.User }
}

func (s *Session) isOwn(jid types.JID) bool {
	return jid.User == s.store.Device.GetJID().User || jid.User == s.store.Device.GetLID().User
}

// aloneIn reports whether we are the last member of a group: then there was nobody to encrypt for.
func (s *Session) aloneIn(group types.JID) bool {
	if group.Server != types.GroupServer {
		return false
	}
	info, err := s.cli.GetGroupInfo(s.ctx, group)
	return err == nil && s.onlyOwn(info.Participants)
}

func (s *Session) onlyOwn(members []types.GroupParticipant) bool {
	return !slices.ContainsFunc(members, func(p types.GroupParticipant) bool { return !s.isOwn(p.JID) })
}

// resolve checks that the recipient exists and returns the address that whatsmeow will send to.
func (s *Session) resolve(ctx context.Context, to types.JID) (types.JID, *frames.Error) {
	if to.Server == types.GroupServer {
		return to, nil
	}
	if to.Server == types.DefaultUserServer {
		lid, err := s.lookUpLID(ctx, to)
		if err != nil {
			return to, err
		}
		to = lid
	}
	devices, err := s.cli.GetUserDevices(ctx, []types.JID{to})
	if err != nil {
		return to, classifySend(err)
	}
	if len(devices) == 0 {
		return to, frames.Errorf(frames.CodeRecipientNotFound, "WhatsApp knows no device of this account")
	}
	return to, nil
}

func (s *Session) lookUpLID(ctx context.Context, to types.JID) (types.JID, *frames.Error) {
	lid, err := s.store.Device.LIDs.GetLIDForPN(ctx, to)
	if err != nil {
		return to, classifySend(err)
	}
	if !lid.IsEmpty() {
		return lid, nil
	}
	info, err := s.cli.GetUserInfo(ctx, []types.JID{to})
	if err != nil {
		return to, classifySend(err)
	}
	if lid = info[to].LID; lid.IsEmpty() {
		return to, frames.Errorf(frames.CodeRecipientNotFound, "there is no WhatsApp account with this number")
	}
	return lid, nil
}

// parseRecipient accepts whole JIDs of people and groups, without a device.
func parseRecipient(text string) (types.JID, *frames.Error) {
	invalid := frames.Errorf(frames.CodeInvalidRecipient, "the recipient is not of the form <digits>@s.whatsapp.net, <digits>@lid or <id>@g.us")
	user, server, found := strings.Cut(text, "@")
	allowed := "0123456789"
	switch server {
	case types.DefaultUserServer, types.HiddenUserServer:
	case types.GroupServer:
		allowed += "-"
	default:
		return types.EmptyJID, invalid
	}
	if !found || user == "" || len(user) > 64 || strings.Trim(user, allowed) != "" {
		return types.EmptyJID, invalid
	}
	return types.NewJID(user, server), nil
}
