//! Open connections obey the trust bundle of now, and not the one that they were made under.
//!
//! Each worker keeps what its connections by mutual TLS stand on, and asks each new bundle about
//! all of them, before it says that it uses the bundle. A connection whose issuer was denied loses
//! its socket at that moment, whatever its task waits for. One whose anchor was withdrawn is told,
//! and its story ends it in good order. What is said of a connection never gets better again.
//!
//! HTTP goes as well, in good order, when our own SVID is of another issuer than the one that the
//! connection was made with: so a new issuer is soon seen to do well, or not, while there is a way
//! back, and an old anchor is hardly in use any more when it is withdrawn.
//!
//! All of it lives on one thread: bytes that pass take no lock and wake nobody.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use steadfast_api::KeyId;
use steadfast_identity_client::{Footing, Standing, Trust};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::io::{BoxIo, Io};
use crate::metrics::Direction;
use crate::refusal::Refusal;

/// The connections of a worker.
#[derive(Clone, Default)]
pub struct Standings(Rc<Registry>);

#[derive(Default)]
struct Registry {
    held: RefCell<BTreeMap<u64, Weak<Held>>>,
    next: Cell<u64>,
    /// Of our own SVID, the newest.
    own_issuer: Cell<Option<KeyId>>,
}

/// How one connection stands; cheap to clone.
#[derive(Clone)]
pub struct Stand(Rc<Held>);

/// A connection that loses its socket once an issuer of either end is denied.
pub struct Guarded(Rc<Held>);

/// A connection that was cut.
pub type Cut = (Direction, SocketAddr, Refusal);

struct Held {
    number: u64,
    registry: Rc<Registry>,
    footing: Footing,
    direction: Direction,
    addr: SocketAddr,
    standing: Cell<Standing>,
    /// Our own SVID is of another issuer by now.
    superseded: Cell<bool>,
    /// `None` once it was cut, or is no longer needed.
    io: RefCell<Option<BoxIo>>,
    reader: RefCell<Option<Waker>>,
    writer: RefCell<Option<Waker>>,
    /// Who waits for a change; a place is used again when its waiter has left.
    waiting: RefCell<Vec<Option<Waker>>>,
}

impl Standings {
    /// Takes a connection that was made just now. The bundle may have changed since its handshake
    /// began: it is asked at once.
    ///
    /// # Errors
    /// [`Refusal::Distrusted`]: an issuer is denied.
    pub fn hold(
        &self,
        footing: Footing,
        trust: Option<&Trust>,
        (direction, addr): (Direction, SocketAddr),
        io: BoxIo,
    ) -> Result<(Guarded, Stand), Refusal> {
        let standing = trust.map_or(Standing::Good, |trust| footing.standing(trust));
        let number = self.0.next.replace(self.0.next.get() + 1);
        let held = Rc::new(Held {
            number,
            registry: self.0.clone(),
            superseded: Cell::new(self.0.supersedes(&footing)),
            footing,
            direction,
            addr,
            standing: Cell::new(standing),
            io: RefCell::new(Some(io)),
            reader: RefCell::default(),
            writer: RefCell::default(),
            waiting: RefCell::default(),
        });
        if matches!(standing, Standing::Denied(..)) {
            return Err(held.refusal());
        }
        self.0.held.borrow_mut().insert(number, Rc::downgrade(&held));
        Ok((Guarded(held.clone()), Stand(held)))
    }

    /// Asks a new bundle about every connection, and cuts those it denies: to be told and counted.
    pub fn judge(&self, trust: &Trust) -> Vec<Cut> {
        let all: Vec<_> = self.0.held.borrow().values().filter_map(Weak::upgrade).collect();
        all.iter().filter_map(|held| held.judge(trust)).collect()
    }

    /// Our own SVID is of this issuer from now on.
    pub fn supersede(&self, issuer: KeyId) {
        if self.0.own_issuer.replace(Some(issuer)) == Some(issuer) {
            return;
        }
        let all: Vec<_> = self.0.held.borrow().values().filter_map(Weak::upgrade).collect();
        for held in all.iter().filter(|held| self.0.supersedes(&held.footing)) {
            held.superseded.set(true);
            held.wake();
        }
    }

    /// How many connections there are.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.held.borrow().len()
    }
}

impl Registry {
    fn supersedes(&self, footing: &Footing) -> bool {
        footing
            .own_issuer()
            .zip(self.own_issuer.get())
            .is_some_and(|(made_with, now)| made_with != now)
    }
}

impl Stand {
    /// Waits until the connection is to end: in good order, or cut.
    pub async fn lost(&self) {
        self.0.wait(|held| held.standing.get() > Standing::Good).await;
    }

    /// Waits until the connection is to take no more requests: it is to end, or was made with an
    /// SVID of an issuer that is not ours any more.
    pub async fn over(&self) {
        self.0.wait(|held| held.standing.get() > Standing::Good || held.superseded.get()).await;
    }

    /// Waits until the connection has been cut.
    pub async fn cut(&self) {
        self.0.wait(|held| matches!(held.standing.get(), Standing::Denied(..))).await;
    }

    /// Whether the connection has been cut; it was told then.
    pub fn is_cut(&self) -> bool {
        matches!(self.0.standing.get(), Standing::Denied(..))
    }

    /// Why it has to end, with both ends by name.
    pub fn refusal(&self) -> Refusal {
        self.0.refusal()
    }

    /// Which side of the proxy it is on, and where the peer is.
    pub fn place(&self) -> (Direction, SocketAddr) {
        (self.0.direction, self.0.addr)
    }
}

/// Whether a connection broke because it was cut: that was told already.
pub fn is_cut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Distrusted>())
}

impl Held {
    fn judge(&self, trust: &Trust) -> Option<Cut> {
        let (old, new) = (self.standing.get(), self.footing.standing(trust));
        if new <= old {
            return None;
        }
        self.standing.set(new);
        let denied = matches!(new, Standing::Denied(..));
        let io = if denied { self.io.take() } else { None };
        let cut = io.map(|mut io| {
            io.abort();
            (self.direction, self.addr, self.refusal())
        });
        self.wake();
        if denied {
            let waiting = [&self.reader, &self.writer];
            waiting.into_iter().filter_map(RefCell::take).for_each(Waker::wake);
        }
        cut
    }

    fn wake(&self) {
        // They stay where they are: a place that looked free would be given to somebody else, and
        // its owner, who still waits for worse, would never be woken.
        let waiting: Vec<_> = self.waiting.borrow().iter().flatten().cloned().collect();
        waiting.into_iter().for_each(Waker::wake);
    }

    fn refusal(&self) -> Refusal {
        let standing = self.standing.get();
        let (what, key) = match standing {
            Standing::Good => return Refusal::Gone(io::ErrorKind::ConnectionAborted.into()),
            Standing::Withdrawn(_, anchor) => ("withdrawn anchor", anchor),
            Standing::Denied(_, issuer) => ("denied issuer", issuer),
        };
        let name = |id: Option<&_>| id.map_or_else(|| "nobody".to_owned(), ToString::to_string);
        let detail = format!(
            "we: {}, peer: {}, {what}: {}",
            name(self.footing.own_id()),
            name(self.footing.peer_id()),
            key.short()
        );
        match standing.code() {
            Some(code) => Refusal::Distrusted { code, detail },
            None => Refusal::Gone(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    async fn wait(&self, until: impl Fn(&Self) -> bool) {
        let mut place = Place { held: self, at: None };
        poll_fn(|cx| {
            if until(self) {
                return Poll::Ready(());
            }
            place.wait(cx);
            Poll::Pending
        })
        .await;
    }

    fn poll<T>(
        &self,
        waiting: &RefCell<Option<Waker>>,
        cx: &mut Context<'_>,
        work: impl FnOnce(Pin<&mut BoxIo>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let mut io = self.io.borrow_mut();
        let Some(io) = io.as_mut() else {
            let kind = io::ErrorKind::ConnectionAborted;
            return Poll::Ready(Err(io::Error::new(kind, Distrusted)));
        };
        let done = work(Pin::new(io), cx);
        if done.is_pending() {
            keep(&mut waiting.borrow_mut(), cx);
        }
        done
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.registry.held.borrow_mut().remove(&self.number);
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Its `Stand` may be there for longer, which must hold no socket open.
        drop(self.0.io.take());
    }
}

/// The place of one who waits.
struct Place<'a> {
    held: &'a Held,
    at: Option<usize>,
}

impl Place<'_> {
    fn wait(&mut self, cx: &Context<'_>) {
        let mut waiting = self.held.waiting.borrow_mut();
        let at = *self.at.get_or_insert_with(|| {
            let free = waiting.iter().position(Option::is_none);
            free.unwrap_or_else(|| {
                waiting.push(None);
                waiting.len() - 1
            })
        });
        keep(&mut waiting[at], cx);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(at) = self.at {
            self.held.waiting.borrow_mut()[at] = None;
        }
    }
}

fn keep(waker: &mut Option<Waker>, cx: &Context<'_>) {
    match waker {
        Some(kept) => kept.clone_from(cx.waker()),
        None => *waker = Some(cx.waker().clone()),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the connection was cut: an issuer is denied")]
struct Distrusted;

impl Io for Guarded {
    fn abort(&mut self) {
        if let Some(io) = self.0.io.borrow_mut().as_mut() {
            io.abort();
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.poll(&self.0.reader, cx, |io, cx| io.poll_read(cx, buf))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.poll(&self.0.writer, cx, |io, cx| io.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.poll(&self.0.writer, cx, |io, cx| io.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.io.borrow().as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll(&self.0.writer, cx, |io, cx| io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll(&self.0.writer, cx, |io, cx| io.poll_shutdown(cx))
    }
}

impl fmt::Debug for Standings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Standings").field(&self.0.held.borrow().len()).finish()
    }
}

impl fmt::Debug for Stand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stand").field(&self.0.standing.get()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt as _;
    use steadfast_api::{Code, TrustBundle, UnixTime};
    use steadfast_identity_client::VerifiedPeer;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;
    use crate::fakes::{ANCHOR, on_worker};

    fn issuer() -> KeyId {
        KeyId::of_spki(b"issuer")
    }

    /// Somebody whose chain ends in the anchor of the bundle, or in another one.
    fn peer(anchor: KeyId) -> Arc<VerifiedPeer> {
        Arc::new(VerifiedPeer {
            id: "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap(),
            dns: None,
            serial: vec![1],
            not_before: UnixTime::from_secs(0),
            not_after: UnixTime::from_secs(1),
            anchor,
            issuer: issuer(),
            issuers: vec![issuer()],
        })
    }

    fn footing(anchor: KeyId) -> Footing {
        Footing::between(None, Some(peer(anchor)))
    }

    fn trust(denied: Option<KeyId>) -> Trust {
        let bundle =
            TrustBundle::parse(&"cluster.local".parse().unwrap(), ANCHOR.as_bytes()).unwrap();
        Trust::new(&bundle, denied, []).unwrap()
    }

    /// A connection under the anchor of the bundle, the peer's end of it, and who holds it.
    fn connection(anchor: KeyId) -> (Standings, Guarded, Stand, DuplexStream) {
        let (ours, theirs) = duplex(16);
        let standings = Standings::default();
        let place = (Direction::Inbound, "10.0.0.9:40000".parse().unwrap());
        let held = standings.hold(footing(anchor), None, place, Box::new(ours));
        let (guarded, stand) = held.unwrap();
        (standings, guarded, stand, theirs)
    }

    fn anchor() -> KeyId {
        trust(None).anchors()[0].id()
    }

    #[test]
    fn a_denied_issuer_takes_the_socket_from_a_connection_that_nobody_polls() {
        on_worker(async {
            let (standings, mut guarded, stand, mut theirs) = connection(anchor());
            assert!(standings.judge(&trust(None)).is_empty());
            guarded.write_all(b"hi").await.unwrap();
            let cut = standings.judge(&trust(Some(issuer())));
            let codes: Vec<_> = cut.iter().map(|(_, _, refusal)| refusal.code()).collect();
            assert_eq!(codes, [Some(Code::PEER_ISSUER_DENIED)]);
            let mut seen = Vec::new();
            theirs.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, b"hi", "its end came although nobody has dropped it");
            let error = guarded.read_u8().await.unwrap_err();
            assert!(is_cut(&error), "{error}");
            assert!(stand.is_cut());
            assert!(standings.judge(&trust(Some(issuer()))).is_empty(), "it is told once");
        });
    }

    #[test]
    fn whoever_reads_or_waits_is_woken_when_a_connection_is_cut() {
        on_worker(async {
            let (standings, mut guarded, stand, _theirs) = connection(anchor());
            let mut reading = Box::pin(guarded.read_u8());
            let (mut lost, mut cut) = (Box::pin(stand.lost()), Box::pin(stand.cut()));
            let waiting = async { tokio::join!(reading.as_mut(), lost.as_mut(), cut.as_mut()) };
            let deny = async { standings.judge(&trust(Some(issuer()))) };
            let ((read, (), ()), told) = tokio::join!(waiting, deny);
            assert!(read.is_err());
            assert_eq!(told.len(), 1);
        });
    }

    #[test]
    fn a_withdrawn_anchor_tells_and_cuts_nothing_until_an_issuer_is_denied_too() {
        on_worker(async {
            let (standings, mut guarded, stand, mut theirs) = connection(KeyId::of_spki(b"gone"));
            assert!(stand.lost().now_or_never().is_none());
            assert!(standings.judge(&trust(None)).is_empty());
            stand.lost().await;
            assert!(stand.cut().now_or_never().is_none());
            assert_eq!(stand.refusal().code(), Some(Code::PEER_ANCHOR_WITHDRAWN));
            theirs.write_all(b"x").await.unwrap();
            assert_eq!(guarded.read_u8().await.unwrap(), b'x');
            assert_eq!(standings.judge(&trust(Some(issuer()))).len(), 1);
            stand.cut().await;
        });
    }

    #[test]
    fn an_own_svid_of_another_issuer_ends_requests_and_cuts_nothing() {
        on_worker(async {
            let (ours, mut theirs) = duplex(16);
            let standings = Standings::default();
            let place = (Direction::Inbound, "10.0.0.9:40000".parse().unwrap());
            let own = Footing::between(Some(peer(anchor())), None);
            let (mut guarded, stand) = standings.hold(own, None, place, Box::new(ours)).unwrap();
            standings.supersede(issuer());
            assert!(stand.over().now_or_never().is_none(), "it is the same one");
            standings.supersede(KeyId::of_spki(b"next"));
            stand.over().await;
            assert!(stand.lost().now_or_never().is_none(), "bytes go on");
            theirs.write_all(b"x").await.unwrap();
            assert_eq!(guarded.read_u8().await.unwrap(), b'x');
        });
    }

    #[test]
    fn a_connection_whose_handshake_began_under_the_old_bundle_is_refused_under_the_new() {
        let (ours, _theirs) = duplex(16);
        let place = (Direction::Inbound, "10.0.0.9:40000".parse().unwrap());
        let now = trust(Some(issuer()));
        let held = Standings::default().hold(footing(anchor()), Some(&now), place, Box::new(ours));
        let refusal = held.err().unwrap();
        assert_eq!(refusal.code(), Some(Code::PEER_ISSUER_DENIED));
        assert!(refusal.to_string().contains("spiffe://cluster.local/ns/demo/sa/web"), "{refusal}");
    }

    #[test]
    fn a_connection_that_has_ended_is_forgotten_and_cut_no_more() {
        on_worker(async {
            let (standings, guarded, stand, _theirs) = connection(anchor());
            drop(guarded);
            assert!(standings.judge(&trust(Some(issuer()))).is_empty());
            assert_eq!(standings.len(), 1);
            drop(stand);
            assert_eq!(standings.len(), 0);
        });
    }

    #[test]
    fn who_comes_between_two_bundles_takes_nobodys_place() {
        on_worker(async {
            let (standings, _guarded, stand, _theirs) = connection(KeyId::of_spki(b"gone"));
            let (go, gone) = tokio::sync::oneshot::channel();
            let mut tasks = tokio::task::JoinSet::new();
            tasks.spawn_local({
                let stand = stand.clone();
                async move {
                    gone.await.unwrap();
                    stand.cut().await;
                }
            });
            tasks.spawn_local(async move { stand.cut().await });
            tokio::task::yield_now().await;
            // The late one runs before the early one looks again.
            go.send(()).unwrap();
            standings.judge(&trust(None));
            tokio::task::yield_now().await;
            standings.judge(&trust(Some(issuer())));
            let second = std::time::Duration::from_secs(1);
            let waited = tokio::time::timeout(second, tasks.join_all()).await;
            assert!(waited.is_ok(), "one of them was never woken");
        });
    }

    #[test]
    fn waiters_that_leave_give_their_places_back() {
        on_worker(async {
            let (_standings, _guarded, stand, _theirs) = connection(anchor());
            for _ in 0..100 {
                assert!(stand.lost().now_or_never().is_none());
            }
            assert_eq!(stand.0.waiting.borrow().len(), 1);
        });
    }
}
