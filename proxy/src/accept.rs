//! The first stage: a TCP connection becomes an [`Accepted`], which knows where it was meant to go.
//!
//! Each worker has its own listening socket on the same port; the kernel deals connections out. A
//! listener that drains takes what already waits in its queue before it closes, so that no client
//! which the kernel has let in is turned away.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use steadfast_process::Drain;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// A connection and where it was meant to go.
#[derive(Debug)]
pub struct Accepted<IO> {
    /// Who connected.
    pub client: SocketAddr,
    /// Our own side of it.
    pub local: SocketAddr,
    /// Where the client wanted to go, if the kernel redirected it here.
    pub orig_dst: Option<OrigDst>,
    /// The connection.
    pub io: IO,
}

/// The destination of a redirected connection, before the redirection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OrigDst(pub SocketAddr);

/// A socket that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {addr}")]
pub struct BindError {
    addr: SocketAddr,
    #[source]
    source: io::Error,
}

/// How many connections a worker may have at once in one direction; shared by its listeners.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Semaphore>);

/// The slots of a worker. Each direction has its own: peers that connect and then idle must not
/// keep the workload from its own connections.
#[derive(Debug)]
pub struct Shares {
    /// For peers.
    pub inbound: Slots,
    /// For the workload.
    pub outbound: Slots,
}

impl Slots {
    /// So many.
    pub fn new(connections: usize) -> Self {
        Self(Arc::new(Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS))))
    }

    /// Takes one, or says that there is none and waits for one. What is said is held meanwhile.
    async fn take<W>(&self, none_left: impl FnOnce() -> W) -> io::Result<OwnedSemaphorePermit> {
        if let Ok(slot) = self.0.clone().try_acquire_owned() {
            return Ok(slot);
        }
        let _waiting = none_left();
        // The semaphore is never closed.
        self.0.clone().acquire_owned().await.map_err(io::Error::other)
    }
}

impl Shares {
    /// A worker's share of the open files that the process may have: a proxied connection has two,
    /// and some are left for everything else.
    pub fn for_open_files(open_files: u64, workers: usize) -> Self {
        let share = open_files.saturating_sub(OPEN_FILES_RESERVED) / 4 / workers.max(1) as u64;
        let share = usize::try_from(share).unwrap_or(usize::MAX).min(CONNECTIONS_MAX);
        Self { inbound: Slots::new(share), outbound: Slots::new(share) }
    }
}

/// Opens one listening socket for each worker. Beforehand a socket that shares with nobody is
/// bound and closed: SO_REUSEPORT alone would let two sidecars take each other's connections.
///
/// # Errors
/// An address that is taken, or not ours.
pub fn bind(addr: SocketAddr, workers: usize) -> Result<Vec<std::net::TcpListener>, BindError> {
    let failed = |source| BindError { addr, source };
    let probe = bind_one(addr)?;
    if workers <= 1 {
        return Ok(vec![probe]);
    }
    let addr = probe.local_addr().map_err(failed)?;
    drop(probe);
    (0..workers).map(|_| listen(addr, true).map_err(failed)).collect()
}

/// Opens a listening socket that is not shared.
///
/// # Errors
/// An address that is taken, or not ours.
pub fn bind_one(addr: SocketAddr) -> Result<std::net::TcpListener, BindError> {
    listen(addr, false).map_err(|source| BindError { addr, source })
}

/// Hands each connection to `each` until the drain starts. One for which there is no slot waits,
/// and those behind it wait in the kernel's queue; what `none_left` returns is held meanwhile.
///
/// # Errors
/// A listener that cannot be given to the runtime. Failures of single connections are no errors,
/// and running out of files makes it wait.
pub async fn run<W>(
    listener: std::net::TcpListener,
    slots: Slots,
    drain: Drain,
    none_left: impl Fn(SocketAddr) -> W,
    each: impl Fn(TcpStream, SocketAddr, OwnedSemaphorePermit),
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let accepted = tokio::select! {
            biased;
            () = drain.wait() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => {
                let slot = slots.take(|| none_left(client)).await?;
                each(stream, client, slot);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    for (stream, client) in let_in(listener.into_std()?) {
        let slot = slots.take(|| none_left(client)).await?;
        stream.set_nonblocking(true)?;
        each(TcpStream::from_std(stream)?, client, slot);
    }
    Ok(())
}

/// What the kernel has let in already: no more than its queue holds. The listener is closed.
fn let_in(listener: std::net::TcpListener) -> Vec<(std::net::TcpStream, SocketAddr)> {
    let mut all = Vec::new();
    loop {
        match listener.accept() {
            Ok(accepted) => all.push(accepted),
            Err(error) if is_of_one_connection(&error) => {}
            Err(_) => return all,
        }
    }
}

/// Learns what the kernel knows of a connection, and sets its options.
///
/// # Errors
/// A connection that is gone already.
pub fn accepted(stream: TcpStream, client: SocketAddr) -> io::Result<Accepted<TcpStream>> {
    set_options(&stream)?;
    let local = canonical(stream.local_addr()?);
    let orig_dst = original_dst(&stream, local);
    Ok(Accepted { client: canonical(client), local, orig_dst, io: stream })
}

impl<IO> Accepted<IO> {
    /// Where a redirected connection goes.
    ///
    /// # Errors
    /// [`Refusal::Loop`]: the client dialled the proxy's own listener, to forward to which would
    /// never end.
    pub fn destination(&self) -> Result<OrigDst, Refusal> {
        match self.orig_dst {
            Some(orig_dst) => Ok(orig_dst),
            None => Err(Refusal::Loop(self.local)),
        }
    }
}

/// Options of every connection, to clients and to servers: no delay, and peers that vanish without
/// a word are noticed.
///
/// # Errors
/// A connection that is gone already.
pub fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_TIME)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// `None` if the kernel has redirected nothing: then the client dialled our own address.
fn original_dst(stream: &TcpStream, local: SocketAddr) -> Option<OrigDst> {
    let socket = SockRef::from(stream);
    let found = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    let orig_dst = canonical(found.ok()?.as_socket()?);
    (orig_dst != local).then_some(OrigDst(orig_dst))
}

/// An IPv4 address that a dual-stack socket shows as IPv6 is an IPv4 address.
fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn listen(addr: SocketAddr, share: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(share)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The connection that was to be accepted failed; the listener is well.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// The kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Of files: the admin port, the control plane, the log, the runtimes.
const OPEN_FILES_RESERVED: u64 = 128;
const CONNECTIONS_MAX: usize = 100_000;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Linkerd's.
const KEEPALIVE_TIME: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
const USER_TIMEOUT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use super::*;
    use crate::metrics::Gauge;

    fn loopback() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[test]
    fn a_port_that_is_taken_is_an_error_even_with_many_workers() {
        let first = bind(loopback(), 2).unwrap();
        let addr = first[0].local_addr().unwrap();
        assert_eq!(first[1].local_addr().unwrap(), addr);
        assert!(bind(addr, 2).is_err());
        assert!(bind(addr, 1).is_err());
    }

    #[tokio::test]
    async fn what_the_kernel_let_in_is_served_when_the_drain_has_begun() {
        let listener = bind(loopback(), 1).unwrap().remove(0);
        let addr = listener.local_addr().unwrap();
        let _waiting = [
            std::net::TcpStream::connect(addr).unwrap(),
            std::net::TcpStream::connect(addr).unwrap(),
        ];
        let (drain, seen) = (Drain::new(), Rc::new(RefCell::new(Vec::new())));
        drain.start();
        let each = |stream, client, _slot| seen.borrow_mut().push((stream, client));
        run(listener, Slots::new(8), drain, |_| (), each).await.unwrap();
        assert_eq!(seen.borrow().len(), 2);
        assert!(std::net::TcpStream::connect(addr).is_err(), "the listener is closed");
    }

    #[tokio::test]
    async fn a_connection_without_a_slot_is_told_of_and_waits_for_one_also_in_a_drain() {
        for draining in [false, true] {
            let listener = bind(loopback(), 1).unwrap().remove(0);
            let addr = listener.local_addr().unwrap();
            let _waiting = [
                std::net::TcpStream::connect(addr).unwrap(),
                std::net::TcpStream::connect(addr).unwrap(),
            ];
            let (drain, waits) = (Drain::new(), Arc::<Gauge>::default());
            let (told, seen) = (Cell::new(0), RefCell::new(Vec::new()));
            if draining {
                drain.start();
            }
            let none_left = |_| {
                told.set(told.get() + 1);
                waits.hold()
            };
            let each = |_, _, slot| seen.borrow_mut().push(slot);
            let mut running =
                std::pin::pin!(run(listener, Slots::new(1), drain.clone(), none_left, each));
            while told.get() == 0 {
                assert!(futures::poll!(running.as_mut()).is_pending());
                tokio::task::yield_now().await;
            }
            assert!(futures::poll!(running.as_mut()).is_pending());
            assert_eq!((seen.borrow().len(), waits.value()), (1, 1));
            // The first one ends, and with it the wait.
            drop(seen.take());
            drain.start();
            running.await.unwrap();
            assert_eq!((seen.borrow().len(), told.get(), waits.value()), (1, 1, 0));
        }
    }

    #[tokio::test]
    async fn a_direction_that_is_full_leaves_the_other_its_slots() {
        let shares = Shares::for_open_files(OPEN_FILES_RESERVED + 4, 1);
        let _peer = shares.inbound.take(|| ()).await.unwrap();
        assert!(futures::poll!(std::pin::pin!(shares.inbound.take(|| ()))).is_pending());
        assert!(shares.outbound.take(|| ()).await.is_ok());
    }

    #[tokio::test]
    async fn a_connection_to_our_own_address_has_no_destination() {
        let listener = TcpListener::bind(loopback()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (_client, accepted_pair) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (stream, client) = accepted_pair.unwrap();
        let accepted = accepted(stream, client).unwrap();
        assert_eq!(accepted.local, addr);
        assert!(matches!(accepted.destination(), Err(Refusal::Loop(own)) if own == addr));
    }
}
