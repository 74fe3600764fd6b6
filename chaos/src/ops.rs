//! What a process of ours asks of the world, and the world's answer: the edge between the real code
//! and the simulation.
//!
//! The real shells are futures that wait for a store, for keys and for replicas. Here each such wait
//! is a [`Call`] in the process's [`Port`]; the world decides when it arrives, what comes of it,
//! when the answer is back, and whether the process still lives then. So a process can be frozen or
//! killed between any two of its steps, without a thread, a socket or a clock.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures::stream::BoxStream;
use steadfast_api::KeyId;
use steadfast_platform::keys::{KeyStore, KeyStoreError, Zeroizing};
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
    Load(KeyId),
    /// Nothing to do until the next look; `true`: look again at once.
    Pause(bool),
    PutKey(KeyId, Zeroizing<Vec<u8>>),
}

/// What is answered.
#[derive(Debug)]
pub(crate) enum Reply {
    Done(Result<(), KeyStoreError>),
    Entries(Result<(Vec<Entry>, Revision), StoreError>),
    Entry(Result<Option<Entry>, StoreError>),
    Exists(bool),
    Key(Result<Zeroizing<Vec<u8>>, KeyStoreError>),
    Keys(Vec<KeyId>),
    Looked(Vec<Replica>),
    Resumed,
    Written(Result<Revision, StoreError>),
}

/// Something asked, and where its answer goes.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) answer: Arc<Mutex<Option<Reply>>>,
}

/// Where a process leaves what it asks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Port(Arc<Mutex<Vec<Call>>>);

impl Port {
    pub(crate) async fn call(&self, op: Op) -> Reply {
        let answer = Arc::new(Mutex::new(None));
        self.0.lock().unwrap().push(Call { op, answer: Arc::clone(&answer) });
        std::future::poll_fn(move |_| match answer.lock().unwrap().take() {
            Some(reply) => Poll::Ready(reply),
            None => Poll::Pending,
        })
        .await
    }

    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap())
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
        match self.future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(()) => None,
            Poll::Pending => Some(self.port.take()),
        }
    }
}

/// What waits for nothing is over at once.
pub(crate) fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("real code waits for what the simulation does not know"),
    }
}

macro_rules! answer {
    ($port:expr, $op:expr, $kind:ident) => {
        match $port.call($op).await {
            Reply::$kind(answer) => answer,
            other => panic!("the world answered {other:?}"),
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
    async fn put_new(&self, id: KeyId, pkcs8: Zeroizing<Vec<u8>>) -> Result<(), KeyStoreError> {
        answer!(self, Op::PutKey(id, pkcs8), Done)
    }

    async fn load(&self, id: KeyId) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
        answer!(self, Op::Load(id), Key)
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
}

#[async_trait::async_trait]
impl Fleet for Port {
    async fn ask(&self, nonce: u64) -> Vec<Replica> {
        answer!(self, Op::Ask(nonce), Looked)
    }
}
