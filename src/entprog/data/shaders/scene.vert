#version 330
// One triangle that covers the frame; each corner knows its viewing ray.

in vec2 corner;
uniform mat3 rays;  // from (x, y, 1) of the frame, in [-1, 1], to a direction in the world
out vec3 ray;

void main() {
    ray = rays * vec3(corner, 1.0);
    gl_Position = vec4(corner, 0.0, 1.0);
}
