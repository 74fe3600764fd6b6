//! A real store in this process, a trust domain in it, tokens of its own making, and the real
//! identity process beside it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use steadfast_api_grpc::trust_client::TrustClient;
use steadfast_identity::authority::{Founding, found};
use steadfast_platform::Store as _;
use steadfast_platform::keys::{FileKeys, Zeroizing};
use steadfast_platform::standalone::{Directory, Engine, Server};
use steadfast_platform::store::{TOKEN_JWKS_KEY, TRUST_DOMAIN_KEY};
use steadfast_process::{Clock as _, Drain, SystemClock};

use super::{WAIT, channel, client_config};

/// A store of this process, and a trust domain in it.
pub struct World {
    pub dir: tempfile::TempDir,
    pub directory: Directory,
    pub founding: Founding,
    pub engine: Engine,
    token_key: EcdsaKeyPair,
    binary: std::path::PathBuf,
    pub drain: Drain,
    _tasks: tokio::task::JoinSet<()>,
}

/// The process under test: killed with the test.
pub struct Identity {
    pub child: Child,
    lines: Arc<std::sync::Mutex<Vec<String>>>,
    pub tls: SocketAddr,
    admin: SocketAddr,
}

impl Drop for Identity {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl World {
    pub async fn new(binary: impl Into<std::path::PathBuf>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path());
        directory.create().unwrap();
        let drain = Drain::new();
        let (engine, writer) = Engine::open(&directory, drain.clone()).unwrap();
        let server = Server::bind(&directory, engine.clone(), Arc::new(SystemClock)).unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { drop(writer.await) });
        let stop = drain.clone();
        tasks.spawn(async move { drop(server.serve(stop).await) });
        let founding = found(&"cluster.local".parse().unwrap(), SystemClock.now()).unwrap();
        let (random, alg) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(alg, &random).unwrap();
        let token_key = EcdsaKeyPair::from_pkcs8(alg, pkcs8.as_ref(), &random).unwrap();
        let world = Self {
            dir,
            directory,
            founding,
            engine,
            token_key,
            binary: binary.into(),
            drain,
            _tasks: tasks,
        };
        world.fill().await;
        world
    }

    /// What `trust init` and the store's other parts write.
    async fn fill(&self) {
        let Founding { state, active, standby, issuer } = &self.founding;
        let anchors = FileKeys::open(self.directory.anchor_keys()).unwrap();
        for anchor in [active, standby] {
            anchors.put_new(anchor.id, Zeroizing::new(anchor.pkcs8.to_vec())).await.unwrap();
        }
        let issuers = FileKeys::open(self.directory.issuer_keys()).unwrap();
        issuers.put_new(issuer.id, Zeroizing::new(issuer.pkcs8.to_vec())).await.unwrap();
        let point = self.token_key.public_key().as_ref();
        let coordinate = |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[range]);
        let jwks = serde_json::json!({"keys": [{
            "kty": "EC", "crv": "P-256", "kid": "k", "alg": "ES256", "use": "sig",
            "x": coordinate(1..33), "y": coordinate(33..65),
        }]});
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web-1", "namespace": "demo", "uid": "u1"},
            "spec": {"serviceAccountName": "web", "containers": []},
        });
        for (key, value) in [
            (TRUST_DOMAIN_KEY, serde_json::to_vec(state).unwrap()),
            (TOKEN_JWKS_KEY, jwks.to_string().into_bytes()),
            ("resources/Pod/demo/web-1", pod.to_string().into_bytes()),
        ] {
            self.engine.compare_and_swap(key, None, Some(Bytes::from(value))).await.unwrap();
        }
    }

    pub fn token(&self, audience: &str, uid: &str) -> Vec<u8> {
        let now = SystemClock.now().as_secs();
        let header = serde_json::json!({"alg": "ES256", "kid": "k", "typ": "JWT"});
        let claims = serde_json::json!({
            "aud": [audience], "exp": now + 600, "iat": now, "nbf": now,
            "iss": "steadfast-store", "jti": uuid(),
            "sub": "system:serviceaccount:demo:web",
            "kubernetes.io": {
                "namespace": "demo",
                "pod": {"name": "web-1", "uid": uid},
                "serviceaccount": {"name": "web"},
            },
        });
        let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = self.token_key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)).into_bytes()
    }

    pub async fn start(&self, flags: &[&str]) -> Identity {
        let mut child = Command::new(&self.binary)
            .arg("--dir")
            .arg(self.dir.path())
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "json"])
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (stderr, lines) = (child.stderr.take().unwrap(), Arc::default());
        let kept: Arc<std::sync::Mutex<Vec<String>>> = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line);
            }
        });
        let addresses = || {
            let lines = lines.lock().unwrap();
            let listening = lines.iter().filter(|line| line.contains("\"listening\""));
            let address = |line: &String| {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                line["address"].as_str().unwrap().parse::<SocketAddr>().unwrap()
            };
            listening.map(address).collect::<Vec<_>>()
        };
        wait(|| addresses().len() == 2, "listening").await;
        let [tls, admin] = addresses()[..] else { panic!("two addresses") };
        Identity { child, lines: lines.clone(), tls, admin }
    }
}

impl Identity {
    pub fn ready(&self) -> String {
        let Ok(mut stream) = TcpStream::connect(self.admin) else { return String::new() };
        let request = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn log(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    pub async fn trust(&self, founding: &Founding) -> TrustClient<tonic::transport::Channel> {
        let config = client_config([&founding.active, &founding.standby]);
        TrustClient::new(channel(self.tls, config).await)
    }
}

pub async fn wait(level: impl Fn() -> bool, what: &str) {
    let waiting = async {
        while !level() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(WAIT, waiting).await.is_ok(), "never {what}");
}

/// Every token has an id of its own.
fn uuid() -> String {
    let mut bytes = [0; 16];
    ring::rand::SecureRandom::fill(&SystemRandom::new(), &mut bytes).unwrap();
    hex::encode(bytes)
}
