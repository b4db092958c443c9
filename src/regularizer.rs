//! Orthogonal regularisation: `weight / (2 n) * (sum ||A A^T - I|| + ||B^T B - I||)` over n adapters, Frobenius norms
//! (the AdaLoRA paper's equation 4 without the square, as PEFT computes it).

/// From the Gram matrix `P P^T` of one factor: the norm of `P P^T - I`, and in place the matrix whose product with P is
/// the gradient of `scale * norm`. Where the norm is zero, so is the gradient.
pub fn penalty(gram: &[f64], rank: usize, scale: f64, gradient: &mut [f64]) -> f64 {
    let mut squares = 0.0;
    for i in 0..rank {
        for j in 0..rank {
            let c = gram[i * rank + j] - if i == j { 1.0 } else { 0.0 };
            squares += c * c;
            gradient[i * rank + j] = c;
        }
    }
    let norm = squares.sqrt();
    let factor = if norm > 0.0 { scale * 2.0 / norm } else { 0.0 };
    gradient[..rank * rank].iter_mut().for_each(|c| *c *= factor);
    norm
}
