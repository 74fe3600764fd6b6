//! `steadfast-proxy --await`: waits until the sidecar beside it is ready. The hook of a container
//! that is no native sidecar: the kubelet starts the next container when it has ended.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// Asks the admin port until it says that the sidecar is ready.
///
/// # Errors
/// What it said last, when it took longer than this.
pub async fn ready(admin: SocketAddr, within: Duration) -> Result<(), String> {
    let end = Instant::now() + within;
    loop {
        let answer = match timeout(ANSWER_MAX, ask(admin)).await {
            Ok(Ok(answer)) if answer.starts_with("HTTP/1.1 200 ") => return Ok(()),
            Ok(Ok(answer)) => answer.lines().last().unwrap_or_default().to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {ANSWER_MAX:?}"),
        };
        if Instant::now() >= end {
            return Err(format!("the sidecar at {admin} is not ready after {within:?}: {answer}"));
        }
        sleep(PAUSE).await;
    }
}

async fn ask(admin: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(admin).await?;
    let request = format!("GET /ready HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await?;
    Ok(answer)
}

const PAUSE: Duration = Duration::from_millis(50);
const ANSWER_MAX: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn it_waits_until_the_sidecar_is_ready_and_tells_why_it_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = listener.local_addr().unwrap();
        let answers = async {
            for status in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await.unwrap();
                let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n[\"no SVID\"]");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let (found, ()) = tokio::join!(ready(admin, Duration::from_secs(20)), answers);
        found.unwrap();
        drop(listener);
        let error = ready(admin, Duration::ZERO).await.unwrap_err();
        assert!(error.contains("refused"), "{error}");
    }
}
