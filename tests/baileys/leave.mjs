// A Baileys session that somebody leaves for warren: pairs, talks with another phone, ends. What stays is its multi-file auth directory.
//
//   node leave.mjs ENDPOINT CONTROL ROOT_KEY DIRECTORY      DIRECTORY/ana is the auth directory of 15550001, which has talked with 15550002

import { Client, jid, nothingPending, phoneSays, request, shownAt, step } from './client.mjs'

const [ANA, BOB] = ['15550001', '15550002']

for (const [number, name] of [[ANA, 'Ana'], [BOB, 'Bob']]) await request('POST', '/phones', { number, name })
const { id: group } = await request('POST', '/groups', { creator: BOB, participants: [ANA], subject: 'Two' })
const ana = new Client('ana')
await ana.pairByQR(ANA)
step('paired')
for (const to of [jid(BOB), group]) {
  for (let i = 0; i < 3; i++) {
    await shownAt(BOB, await ana.say(to, `from Baileys ${i}`), `from Baileys ${i}`)
    const [id] = await phoneSays(BOB, to === group ? group : ANA, `to Baileys ${i}`)
    await ana.text(id)
  }
}
await nothingPending(ANA)
await ana.close()
step('left')
process.exit(0) // Baileys leaves timers behind
