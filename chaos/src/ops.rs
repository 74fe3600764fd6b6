//! What a process of ours asks of the world, and the world's answer: the edge between the real code
//! and the simulation.
//!
//! The real shells are futures that wait for a store, for keys and for replicas. Here each such wait
//! is a [`Call`] in the process's [`Port`]; the world decides when it arrives, what comes of it,
//! when the answer is back, and whether the process still lives then. So a process can be frozen or
//! killed between any two of its steps, without a thread, a socket or a clock.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use bytes::Bytes;
use futures::stream::BoxStream;
use steadfast_api::KeyId;
use steadfast_platform::keys::{KeyStore, KeyStoreError, PrivateKey};
use steadfast_platform::store::Event;
use steadfast_platform::{Entry, Revision, Store, StoreError};
use steadfast_rotation::Fleet;
use steadfast_rotation_protocol::census::Replica;

/// What is asked.
#[derive(Debug)]
pub(crate) enum Op {
    Ask(u64),
    Cas {
        key: String,
        expected: Option<Revision>,
        value: Option<Bytes>,
    },
    Destroy(KeyId),
    Exists(KeyId),
    Get(String),
    Keys,
    List(String),
    Key(KeyId),
    MakeKey,
    /// Nothing to do until the next look; `true`: look again at once.
    Pause(bool),
}

/// What is answered.
pub(crate) enum Reply {
    Done(Result<(), KeyStoreError>),
    Entries(Result<(Vec<Entry>, Revision), StoreError>),
    Entry(Result<Option<Entry>, StoreError>),
    Exists(bool),
    Key(Result<Arc<dyn PrivateKey>, KeyStoreError>),
    Keys(Vec<KeyId>),
    Looked(Vec<Replica>),
    Resumed,
    Written(Result<Revision, StoreError>),
}

/// Something asked, and where its answer goes.
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) answer: Arc<Mutex<Option<Reply>>>,
}

/// Where a process leaves what it asks.
#[derive(Clone, Default)]
pub(crate) struct Port {
    asked: Arc<Mutex<Vec<Call>>>,
    /// Calls that are not answered yet.
    open: Arc<AtomicUsize>,
}

impl Port {
    pub(crate) async fn call(&self, op: Op) -> Reply {
        let answer = Arc::new(Mutex::new(None));
        self.asked.lock().unwrap().push(Call { op, answer: Arc::clone(&answer) });
        self.open.fetch_add(1, Ordering::Relaxed);
        let reply = std::future::poll_fn(move |_| match answer.lock().unwrap().take() {
            Some(reply) => Poll::Ready(reply),
            None => Poll::Pending,
        })
        .await;
        self.open.fetch_sub(1, Ordering::Relaxed);
        reply
    }

    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// A process: real code that waits for the world.
pub(crate) struct Task {
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    port: Port,
}

impl Task {
    pub(crate) fn new(port: Port, future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { future: Box::pin(future), port }
    }

    /// Goes on as far as it can; what it asks now, or nothing when it is over.
    pub(crate) fn go_on(&mut self) -> Option<Vec<Call>> {
        loop {
            match self.future.as_mut().poll(&mut Context::from_waker(&unparks())) {
                Poll::Ready(()) => return None,
                Poll::Pending if self.port.open.load(Ordering::Relaxed) > 0 => {
                    return Some(self.port.take());
                }
                // A key signs on a thread of its own: no simulated time passes.
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

/// Where a key is.
pub(crate) fn place_of(id: KeyId) -> String {
    format!("keys/anchors/{id}.key")
}

/// Wakes this thread: a wake that comes before it parks is not lost.
fn unparks() -> Waker {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    Waker::from(Arc::new(Unpark(std::thread::current())))
}

macro_rules! answer {
    ($port:expr, $op:expr, $kind:ident) => {
        match $port.call($op).await {
            Reply::$kind(answer) => answer,
            _ => panic!("the world answered something else"),
        }
    };
}

#[async_trait::async_trait]
impl Store for Port {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        answer!(self, Op::Get(key.to_owned()), Entry)
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        answer!(self, Op::List(prefix.to_owned()), Entries)
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        answer!(self, Op::Cas { key: key.to_owned(), expected, value }, Written)
    }

    /// The world reads for the replicas when there is something new.
    async fn watch(
        &self,
        _: &str,
        _: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        Err(StoreError::Unavailable("nothing is watched in a simulation".to_owned()))
    }
}

#[async_trait::async_trait]
impl KeyStore for Port {
    async fn make(&self) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        answer!(self, Op::MakeKey, Key)
    }

    async fn key(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        answer!(self, Op::Key(id), Key)
    }

    async fn exists(&self, id: KeyId) -> Result<bool, KeyStoreError> {
        Ok(answer!(self, Op::Exists(id), Exists))
    }

    async fn list(&self) -> Result<Vec<KeyId>, KeyStoreError> {
        Ok(answer!(self, Op::Keys, Keys))
    }

    async fn destroy(&self, id: KeyId) -> Result<(), KeyStoreError> {
        answer!(self, Op::Destroy(id), Done)
    }

    fn place_of(&self, id: KeyId) -> String {
        place_of(id)
    }
}

#[async_trait::async_trait]
impl Fleet for Port {
    async fn ask(&self, nonce: u64) -> Vec<Replica> {
        answer!(self, Op::Ask(nonce), Looked)
    }
}
