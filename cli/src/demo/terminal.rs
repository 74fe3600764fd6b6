//! The terminal while the live view is on it: raw, on its other screen, and put back in order
//! whatever happens.

use std::io::{self, Stdout, stdout};
use std::time::Duration;

use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers, poll, read};
use crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use crossterm::{cursor, execute};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;

use super::observe::Screen;
use super::view::{Look, draw};

/// The terminal, ours until dropped.
pub(crate) struct Live {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    look: Look,
    /// Something was typed or the size has changed: the picture is not what it should be.
    stale: bool,
}

impl Live {
    /// Takes the terminal.
    ///
    /// # Errors
    /// It is none, or has gone.
    pub(crate) fn open(look: Look) -> io::Result<Self> {
        enable_raw_mode()?;
        let terminal = execute!(stdout(), EnterAlternateScreen, cursor::Hide)
            .and_then(|()| Terminal::new(CrosstermBackend::new(stdout())));
        match terminal {
            Ok(terminal) => Ok(Self { terminal, look, stale: true }),
            Err(error) => {
                put_back();
                Err(error)
            }
        }
    }

    /// Draws.
    ///
    /// # Errors
    /// The terminal has gone.
    pub(crate) fn draw(&mut self, screen: &Screen, note: &str) -> io::Result<()> {
        self.stale = false;
        let look = self.look;
        self.terminal.draw(|frame| draw(frame, screen, note, look)).map(drop)
    }

    /// Whether the picture must be drawn anew.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale
    }

    /// Whether the user has asked to end it. Never waits.
    ///
    /// # Errors
    /// The terminal has gone.
    pub(crate) fn end_asked(&mut self) -> io::Result<bool> {
        while poll(Duration::ZERO)? {
            match read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        // Raw: a Ctrl-C is a key, not a signal.
                        KeyCode::Char('c') if control => return Ok(true),
                        KeyCode::Char('q' | 'Q') | KeyCode::Esc => return Ok(true),
                        KeyCode::Char('l') if control => {
                            self.terminal.clear()?;
                            self.stale = true;
                        }
                        _ => {}
                    }
                }
                Event::Resize(..) => self.stale = true,
                _ => {}
            }
        }
        Ok(false)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        put_back();
    }
}

/// A terminal that has gone needs nothing put back.
fn put_back() {
    let _ = execute!(stdout(), LeaveAlternateScreen, cursor::Show);
    let _ = disable_raw_mode();
}
