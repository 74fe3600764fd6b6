//! The table of members: who has a trust stream open here, and for a while who had one.
//!
//! It is bounded and yet never full: who is known is never turned away, and whoever comes new takes
//! the place of the member whose stream ended longest ago. One pod has a few places only, since it
//! says itself when its proxy started.
//!
//! A member that had to go is unknown here from then on, and a census must not take that for a word
//! about it. A pod that runs is asked for by the census's own list, whatever this table says. One
//! that has vanished owes its ack until its SVID must have ended, counted from its last stream; of
//! one that had to go, nobody here knows any more when that was. So the latest such time is kept
//! ([`Members::forgotten`]): a census counts from there for whoever it finds nowhere. A pod's own
//! older starts are no part of that, as only its newest is ever asked.

use std::collections::{BTreeMap, HashMap};

use steadfast_api::{Code, UnixTime};
use tokio::sync::oneshot;

use crate::member::{Ack, Instance, Member};
use crate::refusal::Refusal;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Members, also those whose stream has ended.
    pub members: usize,
    /// Open streams before newcomers are sent elsewhere.
    pub streams: usize,
}

/// All members of this replica.
#[derive(Debug)]
pub struct Members {
    by_instance: BTreeMap<Instance, Member>,
    /// The streams that count, by their ids: what is dropped here ends its stream.
    open: HashMap<u64, oneshot::Sender<()>>,
    last_stream: u64,
    forgotten: Option<UnixTime>,
    bounds: Bounds,
}

/// A stream's place in the table.
#[derive(Debug)]
pub struct Joined {
    /// Names the stream.
    pub id: u64,
    /// Ends when the stream has lost its place.
    pub replaced: oneshot::Receiver<()>,
}

impl Members {
    /// Nobody yet.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            by_instance: BTreeMap::new(),
            open: HashMap::new(),
            last_stream: 0,
            forgotten: None,
            bounds,
        }
    }

    /// A new stream of an instance takes the place of an older one, which may be dead already
    /// without anybody having noticed.
    ///
    /// # Errors
    /// [`Code::RATE_LIMITED`] for a newcomer while too many streams are open.
    pub fn join(&mut self, mut member: Member) -> Result<Joined, Refusal> {
        if let Some(older) = self.by_instance.remove(&member.instance) {
            self.end(&older);
            member.inherit(older);
        } else {
            if self.open.len() >= self.bounds.streams {
                let what = format!("{} trust streams are open on this replica", self.open.len());
                return Err(Refusal::new(Code::RATE_LIMITED, what));
            }
            self.make_room_in_pod(&member.instance);
            self.make_room();
        }
        self.last_stream += 1;
        let (open, replaced) = oneshot::channel();
        self.open.insert(self.last_stream, open);
        member.open = Some(self.last_stream);
        self.by_instance.insert(member.instance.clone(), member);
        Ok(Joined { id: self.last_stream, replaced })
    }

    /// A stream has ended.
    pub fn leave(&mut self, instance: &Instance, id: u64, now: UnixTime) {
        self.open.remove(&id);
        if let Some(member) = self.by_instance.get_mut(instance)
            && member.open == Some(id)
        {
            member.open = None;
            member.last_seen = now;
        }
    }

    /// Keeps an ack that came over this stream; `false` if that stream has lost its place, so that
    /// what it says is no word of the member's any more.
    pub fn acked(&mut self, instance: &Instance, id: u64, ack: Ack) -> bool {
        let member = self.by_instance.get_mut(instance).filter(|member| member.open == Some(id));
        let Some(member) = member else { return false };
        member.last_seen = ack.at;
        member.acked(ack);
        true
    }

    /// A member that is known.
    pub fn of(&mut self, instance: &Instance) -> Option<&mut Member> {
        self.by_instance.get_mut(instance)
    }

    /// All of them, by pod UID.
    pub fn all(&self) -> Vec<Member> {
        self.by_instance.values().cloned().collect()
    }

    /// The next few of them, in the order of their pods' UIDs.
    pub fn after(&self, last: Option<&Instance>, count: usize) -> Vec<&Member> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = last.map_or(Unbounded, Excluded);
        let following = self.by_instance.range((from, Unbounded));
        following.take(count).map(|(_, member)| member).collect()
    }

    /// How many streams are open.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// When the last of the members that had to go was seen.
    pub fn forgotten(&self) -> Option<UnixTime> {
        self.forgotten
    }

    /// Forgets members whose stream ended before this.
    pub fn tidy(&mut self, ended_before: UnixTime) {
        self.by_instance
            .retain(|_, member| member.open.is_some() || member.last_seen > ended_before);
    }

    /// A pod runs one proxy at a time: of its starts, the newest few are kept.
    fn make_room_in_pod(&mut self, newcomer: &Instance) {
        let first = Instance { pod_uid: newcomer.pod_uid.clone(), started_at: UnixTime::default() };
        let starts = self.by_instance.range(first..);
        let starts = starts.take_while(|(instance, _)| instance.pod_uid == newcomer.pod_uid);
        let starts: Vec<_> =
            starts.map(|(i, m)| (m.open.is_some(), m.last_seen, i.clone())).collect();
        if starts.len() < STARTS_PER_POD_MAX {
            return;
        }
        let oldest = starts.into_iter().min().map(|(.., instance)| instance);
        if let Some(older) = oldest.and_then(|instance| self.by_instance.remove(&instance)) {
            self.end(&older);
        }
    }

    /// Many at once, since all are looked at to find the oldest.
    fn make_room(&mut self) {
        if self.by_instance.len() < self.bounds.members {
            return;
        }
        let closed = self.by_instance.values().filter(|member| member.open.is_none());
        let mut closed: Vec<_> =
            closed.map(|member| (member.last_seen, member.instance.clone())).collect();
        closed.sort_unstable();
        closed.truncate(self.bounds.members / EVICTED_SHARE + 1);
        self.forgotten = self.forgotten.max(closed.last().map(|(last_seen, _)| *last_seen));
        for (_, instance) in closed {
            self.by_instance.remove(&instance);
        }
    }

    fn end(&mut self, member: &Member) {
        if let Some(id) = member.open {
            self.open.remove(&id);
        }
    }
}

/// Starts of one pod's proxy.
const STARTS_PER_POD_MAX: usize = 4;
/// One in so many goes when there is no room.
const EVICTED_SHARE: usize = 100;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use steadfast_platform::ReviewedToken;

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1000);

    fn table(members: usize, streams: usize) -> Members {
        Members::new(Bounds { members, streams })
    }

    fn member(pod: u32, started_secs: i64) -> Member {
        let pod_uid = format!("pod-{pod}");
        let token = ReviewedToken {
            namespace: "demo".into(),
            service_account: "web".into(),
            pod_name: pod_uid.clone(),
            pod_uid: pod_uid.clone(),
            node: None,
            token_id: "token".into(),
            expires: NOW,
        };
        let instance = Instance { pod_uid, started_at: UnixTime::from_secs(started_secs) };
        let id = "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap();
        Member::new(instance, id, &token, "1".into(), NOW)
    }

    fn come_and_go(table: &mut Members, pod: u32, at: UnixTime) {
        let member = member(pod, 1);
        let joined = table.join(member.clone()).unwrap();
        table.leave(&member.instance, joined.id, at);
    }

    #[test]
    fn a_full_table_turns_nobody_away_and_lets_go_of_the_longest_ended() {
        let mut table = table(100, 100);
        let open = table.join(member(999, 1)).unwrap();
        for pod in 0..1000 {
            come_and_go(&mut table, pod, NOW + Duration::from_secs(u64::from(pod)));
            assert!(table.all().len() <= 100);
        }
        assert!(table.of(&member(0, 1).instance).is_none());
        assert!(table.of(&member(998, 1).instance).is_some());
        assert_eq!(table.of(&member(999, 1).instance).unwrap().open, None, "it came again");
        drop(open);
        let forgotten = table.forgotten().unwrap();
        assert!(forgotten > NOW + Duration::from_secs(850), "{forgotten}");
    }

    #[test]
    fn an_open_stream_is_never_let_go_for_a_newcomer() {
        let mut table = table(10, 100);
        let mut open = table.join(member(5000, 1)).unwrap();
        for pod in 0..100 {
            come_and_go(&mut table, pod, NOW);
        }
        assert_eq!(table.of(&member(5000, 1).instance).unwrap().open, Some(open.id));
        assert_eq!(open.replaced.try_recv(), Err(oneshot::error::TryRecvError::Empty));
    }

    #[test]
    fn one_pod_has_a_few_places_whatever_it_says_of_its_starts() {
        let mut table = table(100, 100);
        let mut streams: Vec<_> =
            (0..1000).map(|secs| table.join(member(1, secs)).unwrap()).collect();
        assert_eq!((table.all().len(), table.open()), (STARTS_PER_POD_MAX, STARTS_PER_POD_MAX));
        assert!(
            streams[0]
                .replaced
                .try_recv()
                .is_err_and(|e| e == oneshot::error::TryRecvError::Closed)
        );
        assert!(table.join(member(2, 1)).is_ok());
        assert_eq!(table.forgotten(), None, "only its newest start is ever asked");
    }

    #[test]
    fn past_the_bound_of_streams_only_newcomers_are_sent_elsewhere() {
        let mut table = table(100, 2);
        come_and_go(&mut table, 3, NOW);
        let _streams = [table.join(member(1, 1)).unwrap(), table.join(member(2, 1)).unwrap()];
        assert_eq!(table.join(member(4, 1)).unwrap_err().code, Code::RATE_LIMITED);
        assert!(table.join(member(3, 1)).is_ok(), "known, its stream has ended");
        assert!(table.join(member(1, 1)).is_ok(), "known, and takes its own place");
        assert_eq!(table.open(), 3);
    }

    #[test]
    fn a_stream_that_lost_its_place_takes_nothing_with_it() {
        let mut table = table(100, 100);
        let older = table.join(member(1, 1)).unwrap();
        let newer = table.join(member(1, 1)).unwrap();
        table.leave(&member(1, 1).instance, older.id, NOW);
        assert_eq!(table.of(&member(1, 1).instance).unwrap().open, Some(newer.id));
        assert_eq!(table.open(), 1);
    }
}
